"""The search in a block on toys of which every choice can be tried, and factors on weights' ranges."""

import itertools

import pytest
import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import MINMAX, MSE
from vlmq_vllm.offline.methods.qvlm.blocks import mean_square, search_block
from vlmq_vllm.offline.methods.qvlm.ranges import find_ranges

CPU = torch.device("cpu")


class Toy:
    """A layer with a function for every candidate, and what is wanted after it."""

    def __init__(self, functions, target):
        self.functions, self.target, self.tried = functions, target, []

    def full_outputs(self):
        return [self.target]

    def hold(self, candidate):
        self.tried.append(candidate)

    def run(self, state):
        return [self.functions[self.tried[-1]](x) for x in state]


def search(layers, start):
    return search_block(layers, [start], len(layers[0].functions), Ranks(CPU), CPU)


def multiplied(factors: list[list[float]]):
    """Layers that multiply a number, and what is put in; what is wanted after each is 1."""
    one = torch.ones(1, dtype=torch.float64)
    return [Toy([lambda x, f=factor: f * x for factor in own], one) for own in factors], one


def test_joint_is_strictly_better_where_the_best_first_step_leads_astray():
    """1.2 is nearer to 1 than 0.7, but only 0.7 can be put right: 0.7 * 1.3 = 0.91, while 1.2 * 1.3 = 1.56."""
    found = search(*multiplied([[1.2, 0.7], [1.3, 2.0]]))
    assert found.greedy == (0, 0) and found.greedy_error == pytest.approx(0.56**2)
    assert found.joint == (1, 0) and found.error == pytest.approx(0.09**2)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_joint_lies_between_greedy_and_the_best_of_all(depth, candidates):
    better = 0
    for _ in range(20):
        weights = torch.randn(depth, candidates, 4, 4, dtype=torch.float64) / 2
        targets = torch.randn(depth, 3, 4, dtype=torch.float64)
        layers = [
            Toy([lambda x, w=w: torch.tanh(x @ w) for w in own], target)
            for own, target in zip(weights, targets, strict=True)
        ]
        start = torch.randn(3, 4, dtype=torch.float64)
        found = search(layers, start)
        errors = {}
        for choice in itertools.product(range(candidates), repeat=depth):
            state = start
            for layer, c in zip(layers, choice, strict=True):
                state = layer.functions[c](state)
            errors[choice] = mean_square([state], [targets[-1]], Ranks(CPU), CPU)
        assert found.error == errors[found.joint] and found.greedy_error == errors[found.greedy]
        assert min(errors.values()) <= found.error <= found.greedy_error
        better += found.error < found.greedy_error
    assert bool(better) == (depth > 1 and candidates > 1)


def test_a_block_of_one_layer_is_greedy_and_is_looked_at_once():
    layer = Toy([lambda x, c=c: x - c for c in range(4)], torch.zeros(1))
    found = search([layer], torch.full((1,), 2.0))
    assert found.joint == found.greedy == (2,) and layer.tried == [0, 1, 2, 3]


def test_of_equal_candidates_the_first_is_taken():
    found = search(*multiplied([[1.1, 1.1, 1.1], [0.8, 0.8, 0.8]]))
    assert found.joint == found.greedy == (0, 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "group"), [((5, 64), 32), ((3, 100), 32), ((7, 33), -1)])
@pytest.mark.parametrize("search", [MSE, MINMAX])
def test_a_factor_of_one_is_plain_rounding(bits, symmetric, shape, group, search):
    weight, format = torch.randn(shape), WeightFormat(bits, group, symmetric)
    expected = round_to_nearest(weight, format, torch.bfloat16, search).tensors()
    found = find_ranges(weight, format, torch.bfloat16, search).rounded(weight).tensors()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("factor", [0.5, 0.9, 1.3])
def test_a_factor_multiplies_the_range_and_clips_at_it(symmetric, factor):
    """What is rounded is the weight cut to factor * [scale * (0 - zero), scale * (top - zero)]."""
    weight, format = torch.randn(6, 64), WeightFormat(3, 32, symmetric)
    ranges = find_ranges(weight, format, torch.float32)
    zero = format.middle if ranges.zero is None else ranges.zero.float().repeat_interleave(32, 1)
    scale = factor * ranges.scale.repeat_interleave(32, 1)
    low, high = scale * (0 - zero), scale * (7 - zero)
    found = ranges.rounded(weight, factor).dequantize()
    assert ((found - weight.clamp(low, high)).abs() <= scale * 0.5 + 1e-6).all()


def test_a_factor_per_group_is_each_groups_own():
    weight, format = torch.randn(4, 64), WeightFormat(2, 32, False)
    ranges = find_ranges(weight, format, torch.bfloat16)
    factors = torch.tensor([[1.0, 0.8]]).expand(4, 2)
    found = ranges.rounded(weight, factors).dequantize()
    torch.testing.assert_close(found[:, :32], ranges.rounded(weight).dequantize()[:, :32])
    torch.testing.assert_close(found[:, 32:], ranges.rounded(weight, 0.8).dequantize()[:, 32:])
