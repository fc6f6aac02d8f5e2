"""Stacks with rounded weights and activations: toys of a few layers in float64, computed once more by hand."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch

from benchmarks.qvlm_fake.fake import PERCENTILES, fake, row_ranges
from benchmarks.qvlm_fake.fake_stack import RoundedStack, search_stack
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.model.streams import Stream

CPU = torch.device("cpu")
NAMES = [f"layers.{k}" for k in range(5)]


class Layer(torch.nn.Module):
    """x + down(tanh(up(x))) for x [B, T, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 9).double(), torch.nn.Linear(9, 6).double()
        for linear in (self.up, self.down):
            linear.weight.data.normal_().pow_(3).div_(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Experts(torch.nn.Module):
    """Of three experts the first two get a row each by the sign of its first value; the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, sign = torch.zeros_like(x), (x[..., 0] > 0).long()
        for k, expert in enumerate(self.experts):
            out[sign == k] = expert(x[sign == k])
        return out


class Stack:
    """What the search asks of a model's files."""

    def __init__(self, layer: type) -> None:
        self.modules = {name: layer().requires_grad_(False) for name in NAMES}

    def materialise(self, name: str, device: torch.device) -> torch.nn.Module:
        return deepcopy(self.modules[name])

    def loaded(self, name: str, device: torch.device) -> AbstractContextManager:
        return nullcontext(self.materialise(name, device))

    def release(self, name: str) -> None:
        pass


def streams() -> tuple[list[Stream], list[Stream]]:
    """U and F, which differ; values have long tails."""
    hidden = [torch.randn(*shape, 6).double() ** 3 for shape in [(2, 11), (1, 7), (3, 1)]]
    calls = [((), {})] * len(NAMES)
    return [Stream(x * 1.1 + 0.05, calls) for x in hidden], [Stream(x, calls) for x in hidden]


def rows(group: list[Stream]) -> np.ndarray:
    """The hidden states [N, C] of all batches."""
    return torch.cat([stream.hidden.flatten(0, 1) for stream in group]).numpy()


def searched(seed: int, bits: int, per_token: bool, **options) -> RoundedStack:
    torch.manual_seed(seed)
    return search_stack(Stack(Layer), NAMES, bits, per_token, *streams(), CPU, **options)


def nearest(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Of 2^bits points over [low, high], which broadcast against x, those next to its values."""
    points = np.linspace(np.broadcast_to(low, x.shape), np.broadcast_to(high, x.shape), 1 << bits)
    return np.take_along_axis(points, np.abs(x - points).argmin(0)[None], 0)[0]


def rounded_by_hand(x: np.ndarray, seen: np.ndarray, share: float, bits: int, per_token: bool) -> np.ndarray:
    """x [N, C] on its own tokens' ranges or on the channels' ranges of `seen` [M, C]."""
    over, axis = (x, 1) if per_token else (seen, 0)
    low, high = (np.quantile(over, one, axis=axis, keepdims=True) for one in (1 - share, share))
    return nearest(x, low, high, bits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("per_token", [True, False], ids=["tower", "decoder"])
def test_the_errors_are_those_of_the_stack_computed_by_hand(per_token, bits, seed):
    """Every layer's inputs rounded in numpy to ranges of the layer's full-precision inputs, or of the token itself."""
    torch.manual_seed(seed)
    stack, (quantized, full) = Stack(Layer), streams()
    u, f = rows(quantized), rows(full)
    found = search_stack(stack, NAMES, bits, per_token, quantized, full, CPU)
    ends = {block.stop - 1: choice for block, choice in zip(found.blocks, found.choices, strict=True)}
    numbers = [number for choice in found.choices for number in choice.joint]
    assert found.shares == [PERCENTILES[number] for number in numbers] and len(numbers) == len(NAMES)
    for k, name in enumerate(NAMES):
        hidden, exact = u, f
        for linear in ("up", "down"):
            own = stack.modules[name].get_submodule(linear)
            weight = fake(own.weight, *row_ranges(own.weight, 1 << bits), 1 << bits)
            assert torch.equal(found.weights[f"{name}.{linear}"], weight)
            inputs = rounded_by_hand(hidden, exact, found.shares[k], bits, per_token)
            kept = found.rounders[f"{name}.{linear}"](torch.from_numpy(hidden))
            np.testing.assert_allclose(kept, inputs, atol=1e-9)  # float64, after at most ten products
            hidden = inputs @ weight.numpy().T + own.bias.numpy()
            exact = exact @ own.weight.numpy().T + own.bias.numpy()
            if linear == "up":
                hidden, exact = np.tanh(hidden), np.tanh(exact)
        u, f = u + hidden, f + exact
        if k in ends:
            assert ends[k].error == pytest.approx(((u - f) ** 2).mean(), rel=1e-9)
    np.testing.assert_allclose(rows(quantized), u, atol=1e-9)
    np.testing.assert_allclose(rows(full), f, atol=1e-9)


@pytest.mark.parametrize("per_token", [True, False], ids=["tower", "decoder"])
def test_joint_search_is_never_worse_than_greedy_and_sometimes_better(per_token):
    choices = [choice for seed in range(8) for choice in searched(seed, 4, per_token).choices]
    assert all(choice.error <= choice.greedy_error for choice in choices)
    assert any(choice.error < choice.greedy_error for choice in choices)
    assert len({number for choice in choices for number in choice.joint}) == len(PERCENTILES)


@pytest.mark.parametrize("per_token", [True, False], ids=["tower", "decoder"])
def test_blocks_of_one_layer_are_greedy(per_token):
    narrow, wide = (searched(1, 4, per_token, depth=depth) for depth in (1, 3))
    assert list(map(len, narrow.blocks)) == [1] * len(NAMES) and max(map(len, wide.blocks)) > 1
    assert all(choice.joint == choice.greedy and choice.error == choice.greedy_error for choice in narrow.choices)
    first = wide.blocks[0]
    # greedy inside the first block is what blocks of one layer do
    assert wide.choices[0].greedy == tuple(narrow.choices[k].joint[0] for k in first)
    assert wide.choices[0].greedy_error == narrow.choices[first.stop - 1].error


def test_one_percentile_is_plain_rounding():
    found = searched(0, 4, False, depth=1, percentiles=(1.0,))
    assert found.shares == [1.0] * len(NAMES) and all(choice.joint == (0,) for choice in found.choices)


def test_an_expert_without_tokens_has_no_range():
    """Its channels cannot be rounded on ranges that are fixed beforehand; ranges of a token itself need none."""
    stack = Stack(Experts)
    with pytest.raises(QuantizeError, match=r"no calibration token reaches layers\.0\.experts\.2, .* more samples"):
        search_stack(stack, NAMES, 4, False, *streams(), CPU)
    found = search_stack(stack, NAMES, 4, True, *streams(), CPU)
    assert set(found.rounders) == set(found.weights) == {f"{name}.experts.{k}" for name in NAMES for k in range(3)}
