"""The column solver against slow references in float64, and the properties that make it GPTQ, GPTAQ and VLMQ."""

import functools

import pytest
import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods.gptq import factor
from vlmq_vllm.offline.methods.gptq import moments as moments_of
from vlmq_vllm.offline.methods.gptq.moments import Moments
from vlmq_vllm.offline.methods.gptq.solve import Solution, Solver, round_to_nearest, solve
from vlmq_vllm.offline.methods.grid import MSE, find_grid, to_codes

FORMAT = WeightFormat(3, 32, False)


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs [tokens, columns] with strongly correlated columns, as activations have."""
    return torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + 0.1 * torch.randn(tokens, columns)


def moments(inputs: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    collected = Moments(inputs.shape[1], inputs.device)
    collected.add(inputs, weights)
    return collected.mean()[0]


def solve_one(weight, h, format=FORMAT, residual=None, **options) -> Solution:
    residual = None if residual is None else residual[None]
    return solve(weight[None], h[None], format, torch.bfloat16, Solver(**options), residual)[0]


def rounded_loss(weight, rounded, h) -> float:
    error = (rounded.dequantize() - weight).double()
    return float(((error @ h.double()) * error).sum() / len(weight))


def reference(weight, h, format, order, damp, residual=None, alpha=0.25, dynamic=False):
    """GPTQ and GPTAQ by their derivation: round a column, spread its error by H^-1, strike the column from H^-1.

    Float64, one column at a time, inverses instead of factors, no blocks. GPTAQ's residual in the form that its authors
    publish: when column i is treated, the columns after it move by w_i alpha sum_j lambda (f_i - x_i) x_j (H_>i)^-1,
    where H_>i holds the columns after i.
    """
    columns = weight.shape[1]
    scale, zero = find_grid(weight, format, torch.bfloat16, MSE)
    group, width = format.group_of(columns), columns if format.group_size == -1 else format.group_size
    w = weight.double().clone()
    h = h.double() + damp * h.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for position, i in enumerate(order.tolist()):
        if dynamic and i % width == 0:
            whole = WeightFormat(format.bits, -1, format.symmetric)
            s, z = find_grid(w[:, i : i + width].float().contiguous(), whole, torch.bfloat16, MSE)
            scale[:, group[i]], zero[:, group[i]] = s[:, 0], z[:, 0]
        s, z = scale[:, group[i]].double(), zero[:, group[i]].double()
        value = w[:, i].clone()
        q = to_codes(value, s, z, format.levels)
        codes[:, i] = q.to(torch.uint8)
        error = (value - (q - z) * s) / inverse[i, i]
        w -= torch.outer(error, inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        after = order[position + 1 :]
        if residual is not None and len(after):
            later = torch.linalg.solve(h[after][:, after], residual.double()[i, after])
            w[:, after] += alpha * torch.outer(value, later)
    return codes


@pytest.mark.parametrize("columns", [40, 128, 300], ids=lambda n: f"{n} columns")
@pytest.mark.parametrize("base", ["gptq", "gptaq"])
def test_equals_the_reference(columns, base, monkeypatch):
    monkeypatch.setattr(factor, "STRIP", 128)
    weight, inputs = torch.randn(16, columns), correlated(2000, columns)
    collected = Moments(columns, "cpu", residual=base == "gptaq")
    collected.add(inputs, torch.rand(2000), inputs + 0.3 * correlated(2000, columns))
    h, residual = collected.mean()
    order = torch.argsort(h.diagonal(), descending=True)
    solution = solve_one(weight, h, residual=residual)
    # the same choices but where float32 and float64 round a column that lies between two codes
    same = (solution.weight.codes == reference(weight, h, FORMAT, order, 0.01, residual)).float().mean()
    assert same > 0.995


@pytest.mark.parametrize("format", [WeightFormat(3, -1, False), WeightFormat(2, 32, False), WeightFormat(4, 64, False)])
@pytest.mark.parametrize("columns", [16, 72, 200])
def test_file_order_finds_each_groups_grid_after_the_compensation(format, columns):
    weight, h = torch.randn(16, columns), moments(correlated(2000, columns))
    solution = solve_one(weight, h, format, act_order=False)
    expected = reference(weight, h, format, torch.arange(columns), 0.01, dynamic=True)
    assert (solution.weight.codes == expected).float().mean() > 0.99


def test_without_a_residual_gptaq_is_gptq_to_the_bit():
    weight, h = torch.randn(16, 96), moments(correlated(500, 96))
    plain, zero = solve_one(weight, h), solve_one(weight, h, residual=torch.zeros(96, 96))
    none = solve_one(weight, h, residual=torch.randn(96, 96), alpha=0.0)
    assert torch.equal(plain.weight.codes, zero.weight.codes) and torch.equal(plain.weight.codes, none.weight.codes)


def test_the_residual_brings_outputs_nearer_to_the_full_precision_ones():
    """|Q x - W f|, which GPTAQ minimises, at 4 bits and with the whole residual."""
    weight, full = torch.randn(32, 96), correlated(3000, 96)
    inputs = full + 0.3 * correlated(3000, 96)
    collected = Moments(96, "cpu", residual=True)
    collected.add(inputs, None, full)
    h, residual = collected.mean()
    format = WeightFormat(4, 32, False)
    ways = [{}, {"residual": residual.clone(), "alpha": 1.0}, {"residual": residual, "alpha": 1.0, "qep": True}]
    found = [solve_one(weight, h, format, **way).weight.dequantize() for way in ways]
    plain, moved, qep = (float((inputs @ q.T - full @ weight.T).square().mean()) for q in found)
    assert moved < 0.9 * plain and qep < moved


def test_qep_rounds_the_least_squares_weight():
    """The target of base "qep" is the minimiser of |Q x - W f|^2, found here by float64 least squares on tokens."""
    # a row that meets a value between two codes goes on with other errors: many rows, so that one hardly counts
    weight, full, lam = torch.randn(256, 96), correlated(3000, 96), torch.rand(3000)
    inputs = full + 0.3 * correlated(3000, 96)
    collected = Moments(96, "cpu", residual=True)
    collected.add(inputs, lam, full)
    h, residual = collected.mean()
    root = lam.double().sqrt()[:, None]
    best = torch.linalg.lstsq(root * inputs.double(), root * (full @ weight.T).double()).solution.T.float()
    order, damp = torch.randperm(96), 1e-7
    triangle = factor.find_factor(h, order, damp)[0][None]
    for given in (residual[None], (weight @ residual)[None]):
        found = factor.qep(weight[None], given, triangle, order[None], 1.0)
        # H has a condition of 3e4 and is summed in float32 (6e-8); the weights move by up to 2
        torch.testing.assert_close(found[0], best, rtol=0, atol=4e-3)
    for alpha, target in ((1.0, best), (0.5, (best + weight) / 2)):
        for act_order in (True, False):
            options = {"damp": damp, "act_order": act_order}
            moved = solve_one(weight, h, residual=residual, qep=True, alpha=alpha, **options)
            expected = solve_one(target, h, **options)
            assert (moved.weight.codes == expected.weight.codes).float().mean() > 0.97  # some lie between two codes


def test_problems_of_one_shape_are_solved_together_as_alone():
    weights = torch.randn(3, 16, 96)
    h = torch.stack([moments(correlated(400, 96)) for _ in range(3)])
    for act_order in (True, False):
        together = solve(weights, h, FORMAT, torch.bfloat16, Solver(act_order=act_order))
        for weight, own, found in zip(weights, h, together, strict=True):
            alone = solve_one(weight, own, act_order=act_order)
            assert (alone.weight.codes == found.weight.codes).float().mean() > 0.995  # products in another order
            torch.testing.assert_close(alone.loss.mean(), found.loss.mean(), rtol=1e-2, atol=0)


def test_stacked_weights_are_split_again():
    weight, h = torch.randn(24, 64), moments(correlated(400, 64))
    for format in (FORMAT, WeightFormat(3, 32, True)):
        first, second = solve_one(weight, h, format).split([16, 8])
        alone = solve_one(weight[16:], h, format)
        assert first.weight.codes.shape == (16, 64)
        assert torch.equal(second.weight.dequantize(), alone.weight.dequantize())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("format", [WeightFormat(2, 64, True), WeightFormat(3, 32, False), WeightFormat(4, -1, True)])
def test_beats_rounding_on_correlated_inputs(format, act_order):
    weight, h = torch.randn(32, 200), moments(correlated(1000, 200))
    solution = solve_one(weight, h, format, act_order=act_order)
    assert solution.loss.mean() < 0.7 * rounded_loss(weight, round_to_nearest(weight, format, torch.bfloat16), h)


def test_loss_is_that_of_the_damped_moments():
    weight, h = torch.randn(32, 200), moments(correlated(1000, 200))
    solution = solve_one(weight, h)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(200)
    assert float(solution.loss.mean()) == pytest.approx(rounded_loss(weight, solution.weight, damped), rel=1e-3)


def test_uncorrelated_inputs_give_rounding():
    weight = torch.randn(8, 64)
    solution = solve_one(weight, torch.diag(torch.rand(64) + 0.1))
    assert torch.equal(solution.weight.codes, round_to_nearest(weight, FORMAT, torch.bfloat16).codes)


@pytest.mark.parametrize("base", ["gptq", "gptaq", "qep"])
def test_equal_weights_give_the_plain_method_and_their_size_changes_nothing(base):
    """To the bit: lambda = 1, no weights, and every lambda times a power of two, which is exact."""
    inputs, weight, lam = correlated(500, 64), torch.randn(8, 64), torch.rand(500)
    full = None if base == "gptq" else inputs + 0.1 * torch.randn(500, 64)

    def codes(weights):
        collected = Moments(64, "cpu", residual=base != "gptq")
        collected.add(inputs, weights, full)
        h, residual = collected.mean()
        return solve_one(weight, h, residual=residual, qep=base == "qep").weight.codes

    assert torch.equal(codes(None), codes(torch.ones(500)))
    assert torch.equal(codes(lam), codes(1024 * lam))
    assert not torch.equal(codes(None), codes(lam))


@pytest.mark.parametrize("columns", [64, 100])
def test_sums_in_blocks_and_with_a_weight_known_beforehand_are_the_plain_ones(columns, monkeypatch):
    monkeypatch.setattr(moments_of, "BLOCK", 32)
    weight, inputs, full = torch.randn(8, columns), correlated(200, columns), correlated(200, columns)
    lam = torch.rand(200)
    plain, known = Moments(columns, "cpu", residual=True), Moments(columns, "cpu", residual=True, weight=weight)
    for collected in (plain, known):
        collected.add(inputs[:150], lam[:150], full[:150])
        collected.add(inputs[150:], lam[150:], full[150:])
    (h, d), (same, moved) = plain.mean(), known.mean()
    x, f, lam = inputs.double(), full.double(), lam.double()[:, None]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)  # sums of 200 products in float32
    close(h.double(), (lam * x).T @ x / 200)
    close(d.double(), (lam * (f - x)).T @ x / 200)
    close(moved, weight @ d)
    assert torch.equal(h, same)


def test_a_token_of_weight_two_is_the_token_twice_and_one_of_weight_zero_is_none():
    """The second is how padding is kept out."""
    inputs, full = correlated(50, 32), correlated(50, 32)
    lam = torch.ones(50)
    lam[7], lam[9] = 2, 0
    kept = [i for i in range(50) if i != 9] + [7]
    weighted, doubled = Moments(32, "cpu", residual=True), Moments(32, "cpu", residual=True)
    weighted.add(inputs, lam, full)
    doubled.add(inputs[kept], None, full[kept])
    torch.testing.assert_close(weighted.h, doubled.h, rtol=1e-5, atol=1e-4)  # sums of 50 products in float32
    torch.testing.assert_close(weighted.residual, doubled.residual, rtol=1e-5, atol=1e-4)


def test_inputs_that_are_always_zero_are_counted_and_rounded():
    inputs = correlated(500, 64)
    inputs[:, 5] = 0
    weight = torch.randn(8, 64)
    solution = solve_one(weight, moments(inputs))
    assert solution.dead == 1
    assert torch.equal(solution.weight.codes[:, 5], round_to_nearest(weight, FORMAT, torch.bfloat16).codes[:, 5])


def test_fewer_tokens_than_columns_are_solved_with_the_damping_that_was_asked_for():
    assert solve_one(torch.randn(8, 64), moments(torch.randn(3, 64))).damp == 0.01


def test_damping_grows_until_the_moments_can_be_factorised():
    """One negative eigenvalue of a tenth of the mean diagonal: 0.01 and 0.04 are too little, 0.16 is enough."""
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    values = torch.ones(32)
    values[0] = -0.1
    h = basis @ torch.diag(values) @ basis.T
    assert solve_one(torch.randn(8, 32), (h + h.T) / 2).damp == pytest.approx(0.16)


@pytest.mark.parametrize("h", [torch.zeros(32, 32), torch.full((32, 32), float("nan"))], ids=["zero", "nan"])
def test_moments_without_use_give_rounding_and_say_so(h):
    weights = torch.randn(2, 4, 32)
    useful = moments(correlated(300, 32))
    bad, good = solve(weights, torch.stack([h, useful]), FORMAT, torch.bfloat16)
    assert bad.damp is None and good.damp == 0.01
    assert torch.equal(bad.weight.codes, round_to_nearest(weights[0], FORMAT, torch.bfloat16).codes)
    assert torch.equal(good.weight.codes, solve_one(weights[1], useful).weight.codes)
