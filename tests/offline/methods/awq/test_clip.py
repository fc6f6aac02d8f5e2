"""Clipped ranges by the blocks of H, against the output error of each group on explicit tokens."""

import pytest
import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods import grid as grids
from vlmq_vllm.offline.methods.gptq.moments import Moments
from vlmq_vllm.offline.methods.gptq.solve import Solver, round_to_nearest, solve
from vlmq_vllm.offline.methods.grid import CLIP, MINMAX, GridSearch, blocks_of, find_grid

FORMATS = [WeightFormat(bits, group, sym) for bits, group in ((2, 32), (3, 32), (4, -1)) for sym in (True, False)]
SHAPES = [(7, 75, 200), (16, 64, 50), (1, 33, 300)]  # rows, columns (the last group of 11, 32 and 1), tokens
DTYPE = torch.bfloat16


def problem(rows: int, columns: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights with outliers, correlated inputs, token weights, and the weighted second moments per token."""
    weight = torch.randn(rows, columns) ** 3
    inputs = torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + 0.3 * torch.randn(tokens, columns)
    weights = torch.rand(tokens) ** 2
    collected = Moments(columns, "cpu")
    collected.add(inputs, weights)
    return weight, inputs, weights, collected.mean()[0]


def clipped_by_hand(weight, inputs, weights, format):
    """The search written out: for each row and group 21 ranges, and each one's weighted squared output error."""
    width = weight.shape[1] if format.group_size == -1 else format.group_size
    found, margins = torch.empty_like(weight), []
    for start in range(0, weight.shape[1], width):
        part, x = weight[:, start : start + width], inputs[:, start : start + width].double()
        for row in range(len(part)):
            low, high = part[row].min().clamp_max(0), part[row].max().clamp_min(0)
            tried = []
            for step in range(21):
                shrink = 1 - 0.5 * step / 20
                rounded = on_grid(part[row], low * shrink, high * shrink, format)
                error = x @ (part[row] - rounded).double()
                tried.append((float((weights.double() * error.square()).sum()), step, rounded))
            tried.sort(key=lambda one: one[:2])
            found[row, start : start + width] = tried[0][2]
            margins.append((tried[1][0] - tried[0][0]) / tried[0][0])
    return found, margins


def on_grid(row, low, high, format):
    """The nearest values on the grid of a range, with a scale that bfloat16 holds."""
    top = 2**format.bits - 1
    span = 2 * max(-low, high) if format.symmetric else high - low
    scale = (span / top).to(DTYPE).float()
    zero = torch.tensor(2.0 ** (format.bits - 1)) if format.symmetric else (-low / scale).round().clamp(0, top)
    return ((row / scale + zero).round().clamp(0, top) - zero) * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_clipping_equals_the_search_on_tokens(format, shape):
    weight, inputs, weights, h = problem(*shape)
    expected, margins = clipped_by_hand(weight, inputs, weights, format)
    assert min(margins) > 1e-6  # float32 sums of the same errors decide alike
    rounded = round_to_nearest(weight, format, DTYPE, CLIP, blocks_of(h, format))
    assert torch.equal(rounded.dequantize(), expected)
    if len(weight) > 1:  # a single row may keep its range
        assert not torch.equal(rounded.dequantize(), round_to_nearest(weight, format, DTYPE, MINMAX).dequantize())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_clipping_never_adds_to_a_groups_output_error(format):
    weight, inputs, weights, h = problem(7, 75, 200)

    def errors(search: GridSearch, **given) -> torch.Tensor:
        error = round_to_nearest(weight, format, DTYPE, search, blocks_of(h, format), **given).dequantize() - weight
        width = 75 if format.group_size == -1 else format.group_size
        parts = zip(error.split(width, 1), inputs.split(width, 1), strict=True)
        return torch.stack([(weights[:, None] * (x @ e.T).square()).sum(0) for e, x in parts])

    full, clipped = errors(MINMAX), errors(CLIP)
    assert (clipped <= full * (1 + 1e-5)).all()  # float32 sums over 200 tokens
    assert (clipped < 0.9 * full).any()


def test_rows_that_are_not_clipped_keep_their_range():
    weight, _, _, h = problem(7, 75, 200)
    format, rows = WeightFormat(3, 32, False), torch.tensor([True, False, True, True, False, False, True])
    blocks = blocks_of(h, format)
    for chunk in (1 << 22, 150):  # all rows at once, and two by two
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grids, "BLOCKS_CHUNK", chunk)
            mixed = find_grid(weight, format, DTYPE, CLIP, blocks, rows)
        free, full = find_grid(weight, format, DTYPE, CLIP, blocks), find_grid(weight, format, DTYPE, MINMAX)
        for part, clipped, ranged in zip(mixed, free, full, strict=True):
            assert torch.equal(part[rows], clipped[rows]) and torch.equal(part[~rows], ranged[~rows])
        assert not torch.equal(mixed[0][rows], full[0][rows])


@pytest.mark.parametrize(("columns", "size"), [(75, 32), (64, 32), (20, 32), (75, -1)])
def test_blocks_are_those_on_the_diagonal(columns, size):
    h, format = torch.randn(columns, columns), WeightFormat(3, size, True)
    blocks, width = blocks_of(h, format), columns if size == -1 else min(size, columns)
    assert blocks.shape == (format.groups(columns), width, width)
    whole = torch.block_diag(*blocks)
    same = format.group_of(columns)[:, None] == format.group_of(columns)
    assert torch.equal(whole[:columns, :columns], h * same)
    assert not whole[columns:].any() and not whole[:, columns:].any()


def test_blocks_of_a_diagonal_h_are_its_diagonal():
    """Uncorrelated inputs: both kinds of importance measure the same."""
    weight, diagonal = torch.randn(9, 75), torch.rand(75)
    format = WeightFormat(3, 32, False)
    by_diagonal = find_grid(weight, format, DTYPE, CLIP, diagonal)
    by_blocks = find_grid(weight, format, DTYPE, CLIP, blocks_of(diagonal.diag(), format))
    for one, other in zip(by_diagonal, by_blocks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_solver_that_does_not_compensate_rounds_on_clipped_grids(symmetric):
    """Two problems at once; the loss is the weighted squared output error per token of every row."""
    format = WeightFormat(3, 32, symmetric)
    first, second = problem(7, 75, 200), problem(7, 75, 90)
    weights, h = (torch.stack([one[i], other[i]]) for i, (one, other) in ((0, (first, second)), (3, (first, second))))
    h[1, 3] = h[1, :, 3] = 0
    rows = torch.arange(7) % 2 == 0
    solver = Solver(CLIP, compensate=False)
    for i, solution in enumerate(solve(weights, h, format, DTYPE, solver, clipped=rows)):
        expected = round_to_nearest(weights[i], format, DTYPE, CLIP, blocks_of(h[i], format), rows)
        assert torch.equal(solution.weight.codes, expected.codes) and torch.equal(solution.weight.scale, expected.scale)
        assert (solution.damp, solution.dead) == (0.0, i)
    _, inputs, lam, _ = first
    error = inputs @ (solve(weights[:1], h[:1], format, DTYPE, solver)[0].weight.dequantize() - weights[0]).T
    loss = solve(weights[:1], h[:1], format, DTYPE, solver)[0].loss
    # float32 sums of 200 tokens and 75 columns in another order
    torch.testing.assert_close(loss, (lam[:, None] * error.square()).sum(0) / 200, rtol=1e-4, atol=0)


def test_a_solver_that_does_not_compensate_takes_no_residual():
    weight, _, _, h = problem(7, 75, 200)
    with pytest.raises(AssertionError, match="residual"):
        solve(weight[None], h[None], FORMATS[0], DTYPE, Solver(CLIP, compensate=False), torch.zeros(1, 75, 75))
    with pytest.raises(AssertionError, match="shrinking"):
        solve(weight[None], h[None], FORMATS[0], DTYPE, Solver(CLIP), clipped=torch.ones(7, dtype=torch.bool))
