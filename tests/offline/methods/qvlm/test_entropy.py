"""Entropies against numpy loops, which tokens they are taken of, and partitions of entropies made by hand."""

import numpy as np
import pytest
import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.qvlm.blocks import find_blocks
from vlmq_vllm.offline.methods.qvlm.entropy import (
    channel_ranges,
    conditional_entropy,
    joint_table,
    neighbour_entropy,
    sampled,
    soft_codes,
)

CPU = torch.device("cpu")


def assigned(value: float, low: float, high: float, levels: int) -> np.ndarray:
    """Equation 5 for one element, in units of the grid's step."""
    step = (high - low) / (levels - 1)
    weights = np.array([np.exp(-(((value - low) / step - m) ** 2)) for m in range(levels)])
    return weights / weights.sum()


def reference(before: np.ndarray, after: np.ndarray, levels: int) -> float:
    """Equation 4, element by element."""
    table = np.zeros((levels, levels))
    for n in range(len(before)):
        for c in range(before.shape[1]):
            first = assigned(before[n, c], before[:, c].min(), before[:, c].max(), levels)
            second = assigned(after[n, c], after[:, c].min(), after[:, c].max(), levels)
            table += np.outer(first, second)
    table /= table.sum()
    return -(table * np.log(table / table.sum(1, keepdims=True))).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (7, 3), (33, 5)])
def test_entropy_is_that_of_loops_in_numpy(bits, tokens, channels):
    before = torch.randn(tokens + 1, channels)
    after = before.roll(1, 0) * 3 + torch.randn(tokens + 1, channels)
    expected = reference(before.double().numpy(), after.double().numpy(), 1 << bits)
    found = neighbour_entropy([before], [after], bits, Ranks(CPU), CPU)
    assert found == pytest.approx(expected, abs=1e-5)  # float32 against float64; entropies are of order 1


def test_batches_of_any_cut_give_the_same_table():
    before, after = torch.randn(2, 12, 5).unbind(0)
    whole = neighbour_entropy([before], [after], 4, Ranks(CPU), CPU)
    parts = [3, 1, 8]
    shaped = [[part[None] for part in x.split(parts)] for x in (before, after)]
    assert neighbour_entropy(*shaped, 4, Ranks(CPU), CPU) == pytest.approx(whole, abs=1e-6)


def test_entropy_does_not_depend_on_scale_and_offset():
    before, after = torch.randn(2, 40, 3).unbind(0)
    one = neighbour_entropy([before], [after], 4, Ranks(CPU), CPU)
    other = neighbour_entropy([before * 1000 + 5], [after * 0.01 - 3], 4, Ranks(CPU), CPU)
    assert other == pytest.approx(one, abs=1e-3)  # the offsets cost float32 two to three digits


def test_soft_codes_are_even_on_a_middle_and_nearest_otherwise():
    bounds = torch.tensor([0.0]), torch.tensor([3.0])
    found = soft_codes(torch.tensor([[1.5], [2.1]]), bounds, 4)[:, 0]
    torch.testing.assert_close(found[0], found[0].flip(0))
    assert found[1].argmax() == 2
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_a_constant_channel_lies_on_one_point():
    x = torch.full((5, 2), 3.0)
    found = soft_codes(x, channel_ranges([x]), 4)
    assert torch.isfinite(found).all() and (found.argmax(-1) == 0).all()


def test_conditional_entropy_of_tables_with_a_known_one():
    torch.testing.assert_close(conditional_entropy(torch.eye(4)), torch.tensor(0.0))
    independent = torch.ones(4, 4)
    torch.testing.assert_close(conditional_entropy(7 * independent), torch.tensor(np.log(4), dtype=torch.float32))


@pytest.mark.parametrize("elements", [1000, 2600, 10**6])
@pytest.mark.parametrize("sizes", [[20] * 100, [1, 33, 20, 7, 19] * 25])
def test_a_subsample_of_many_short_batches_is_that_of_all_their_tokens_at_once(sizes, elements):
    """Batches are one sample each, and shorter than the stride, of which the first token is the same everywhere."""
    before = torch.randn(sum(sizes), 4)
    after = before.roll(1, 1) + 0.3 * torch.randn(sum(sizes), 4)
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    before[firsts], after[firsts] = torch.tensor([9.0, -9.0, 9.0, -9.0]), torch.tensor([-9.0, 9.0, 9.0, -9.0])
    whole = neighbour_entropy([before], [after], 4, Ranks(CPU), CPU, elements)
    batches = [[part[None] for part in x.split(sizes)] for x in (before, after)]
    assert neighbour_entropy(*batches, 4, Ranks(CPU), CPU, elements) == pytest.approx(whole, abs=1e-6)
    full = neighbour_entropy([before], [after], 4, Ranks(CPU), CPU)
    # of 250 tokens a table of 16 x 16 is known to a few percent; first tokens alone have an entropy of about 0
    assert full > 0.5 and whole == pytest.approx(full, rel=0.1)


@pytest.mark.parametrize("length", [4, 16, 64])
@pytest.mark.parametrize("stride", [1, 4, 16, 32, 50])
def test_a_subsample_has_tokens_from_every_place_of_samples_of_one_length(length, stride):
    """A stride that is a multiple of the length would meet one and the same place of every sample."""
    count = 400 * stride // length
    x = torch.arange(float(length)).repeat(count)[:, None].expand(-1, 3)
    (found,) = sampled([x.reshape(count, length, 3)], count * length * 3 // stride)
    assert found.dtype == torch.float32 and len(found) == pytest.approx(count * length / stride, rel=0.02)
    # of 400 places at multiples of the golden ratio no interval's share is off by more than 3 / 400
    shares = found[:, 0].histc(4, 0, length) / len(found)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("sizes", "elements", "stride", "runs"),
    [([5], 1, 5, 1), ([5, 2], 2, 4, 2), ([3, 0, 9], 3, 4, 3), ([1], 8, 1, 1), ([2, 2, 2, 1], 3, 3, 3)],
)
def test_a_subsample_has_one_token_of_every_run(sizes, elements, stride, runs):
    """The last run may be shorter than the others."""
    tokens = torch.arange(float(sum(sizes)))[:, None]
    found = torch.cat(sampled(tokens.split(sizes), elements))
    assert (found[:, 0] // stride).tolist() == list(range(runs))


def test_all_tokens_are_taken_where_there_are_few():
    parts = list(torch.randn(9, 4, dtype=torch.float64).split([2, 7]))
    for part, found in zip(parts, sampled(parts, 36), strict=True):
        assert torch.equal(found, part.float())


def test_the_table_is_differentiable_in_both():
    a, b = torch.randn(2, 6, 3, dtype=torch.float64).unbind(0)
    ranges = channel_ranges([a]), channel_ranges([b])
    assert torch.autograd.gradcheck(
        lambda a, b: conditional_entropy(joint_table(a, b, *ranges, 4)), (a.requires_grad_(), b.requires_grad_())
    )


@pytest.mark.parametrize(
    ("entropies", "depth", "threshold", "blocks"),
    [
        ([], 3, None, [(0, 1)]),
        ([1.0], 3, None, [(0, 1), (1, 2)]),  # the median itself is not above the median
        ([1.0], 3, 0.5, [(0, 2)]),
        ([2.0, 2.0, 2.0], 3, 1.0, [(0, 3), (3, 4)]),
        ([2.0, 2.0, 2.0], 2, 1.0, [(0, 2), (2, 4)]),
        ([2.0, 2.0, 2.0], 1, 1.0, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([0.2, 5.0], 3, 1.0, [(0, 3)]),  # on average above, though the first pair alone is not
        ([0.2, 1.5], 3, 1.0, [(0, 1), (1, 3)]),
        ([1.0, 3.0, 1.0, 2.0, 3.0], 3, None, [(0, 1), (1, 3), (3, 6)]),  # median 2, and (1 + 3) / 2 is not above it
    ],
)
def test_blocks_are_runs_above_the_threshold(entropies, depth, threshold, blocks):
    found = find_blocks(entropies, depth, threshold)
    assert [(block.start, block.stop) for block in found] == blocks


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_layer_is_in_one_block_of_at_most_the_depth(depth):
    found = find_blocks(torch.rand(31).tolist(), depth)
    assert [k for block in found for k in block] == list(range(32))
    assert max(map(len, found)) == depth
