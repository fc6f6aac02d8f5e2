"""The search for channel scales against plain loops: losses, token weights, chunks, rounded activations."""

import copy

import pytest
import torch
from torch import nn

from scaled_blocks import FORMAT, GATE_UP, Block, Scaled, scale, streams_of
from vlmq_vllm.offline.methods.awq import losses
from vlmq_vllm.offline.methods.awq.losses import Trial, candidate_losses
from vlmq_vllm.offline.methods.awq.scalable import Scalable
from vlmq_vllm.offline.methods.awq.search import RATIOS, scales_of
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import MINMAX, MSE
from vlmq_vllm.offline.model.streams import Stream


def rounded(weight, scales, grid):
    return round_to_nearest(weight * scales, FORMAT, torch.bfloat16, grid).dequantize(torch.bfloat16).float() / scales


def plain_search(layer, streams, group, module, inputs, scales_at, weights, error, grid, activations=None):
    """Losses of all exponents by the definition: for each a copy of the layer, run on every batch."""
    totals = []
    for ratio in RATIOS:
        scales, trial = scales_at(ratio), copy.deepcopy(layer)
        for linear in group:
            part = trial.get_submodule(linear)
            part.weight = nn.Parameter(rounded(part.weight, scales, grid), requires_grad=False)
        total = norm = 0.0
        for i, stream in enumerate(streams):
            x = inputs(layer, stream.hidden)
            given = x if activations is None else scales * activations(x / scales)
            difference = trial.get_submodule(module)(given) - layer.get_submodule(module)(x)
            errors = error(difference).mean(-1).flatten()
            lam = torch.ones_like(errors) if weights is None else weights[i]
            total, norm = total + float((lam * errors).double().sum()), norm + float(lam.double().sum())
        totals.append(total / norm)
    return totals


def best(totals):
    """The first exponent with the least loss; the second-best must be worse by more than float32 sums err."""
    first, second = sorted(totals)[:2]
    assert second > first * (1 + 1e-6)
    return RATIOS[totals.index(first)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize(("size", "inner"), [(75, 40), (64, 33)])
@pytest.mark.parametrize("grid", [MINMAX, MSE], ids=["minmax", "mse"])
def test_search_equals_plain_loops(loss, weighted, size, inner, grid):
    layer, streams = Block(size, inner, Scaled(size, 0.0)), streams_of((2, 11), (1, 17), size=size)
    weights = [torch.rand(22) ** 3, torch.rand(17) ** 3] if weighted else None
    error = {"mae": torch.abs, "mse": torch.square}[loss]

    def hidden(model, x):
        return model.norm(x)

    def middle(model, x):
        x = model.norm(x)
        return nn.functional.silu(model.mlp.gate_proj(x)) * model.mlp.up_proj(x)

    def mean(inputs):
        return torch.cat([inputs(layer, stream.hidden).abs().flatten(0, 1) for stream in streams]).mean(0)

    def norm_scales(ratio):
        scales, weight = scales_of(mean(hidden), ratio), layer.norm.weight
        return weight / (weight / scales).bfloat16().float()

    common = {"weights": weights, "error": error, "grid": grid}
    both = plain_search(layer, streams, GATE_UP, "mlp", hidden, norm_scales, **common)
    down = plain_search(
        layer, streams, ["mlp.down_proj"], "mlp.down_proj", middle, lambda r: scales_of(mean(middle), r), **common
    )
    given = dict.fromkeys(("mlp.up_proj", "mlp.down_proj"), weights) if weighted else None
    found = scale(layer, 0, streams, given, loss=loss, grid=grid).ratios
    assert found == dict.fromkeys(GATE_UP, best(both)) | {"mlp.down_proj": best(down)}


@pytest.mark.parametrize("dead", [[], [7], [0, 7, 49], range(50)], ids=len)
@pytest.mark.parametrize("ratio", RATIOS)
def test_scales_are_a_power_of_the_mean_around_one(ratio, dead):
    """Written out for the channels that live; 1 for the others, where AWQ's code has its bound of 1e-4."""
    mean = torch.rand(50) * 10
    mean[3] = 1e-9  # alive, though with the bound for its power
    mean[list(dead)] = 0
    live = {i: max(float(m) ** ratio, 1e-4) for i, m in enumerate(mean.double()) if m > 0}
    middle = (max(live.values()) * min(live.values())) ** 0.5 if live else None
    expected = torch.tensor([live[i] / middle if i in live else 1.0 for i in range(50)])
    torch.testing.assert_close(scales_of(mean, ratio), expected)
    if ratio == 0:
        assert torch.equal(scales_of(mean, ratio), torch.ones(50))


def test_a_dead_channel_leaves_the_others_as_they_are():
    """A norm with a weight of 0; the scales that it was divided by are seen in what is stored."""
    layer, streams = Block(75, 40, Scaled(75, 0.0)), streams_of((2, 11))
    layer.norm.weight[3] = 0
    before = layer.norm.weight.clone()
    found = scale(layer, 0, streams)
    stored, live = found.changed["norm.weight"].float(), before != 0
    assert found.ratios["mlp.up_proj"] > 0 and stored[3] == 0
    scales = (before / stored)[live]
    # max s min s = 1 but for two roundings of the weight to bfloat16, of 2^-9 each
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=2**-7)


def trial(layer, streams, weights=None, count=4):
    down = Scalable("mlp.up_proj", ("mlp.down_proj",), torch.arange(40), None)
    return Trial(down, [4 ** (2 * torch.rand(40) - 1) for _ in range(count)], weights)


def losses_of(layer, streams, trials, loss="mae", inputs=None):
    return candidate_losses(layer, 0, streams, trials, lambda name, weight: rounded(weight, 1, MINMAX), inputs, loss)


@pytest.mark.parametrize("loss", ["mae", "mse"])
def test_a_token_twice_counts_as_one_of_twice_the_weight(loss):
    layer, (stream,) = Block(75, 40, Scaled(75, 0.0)), streams_of((1, 9))
    twice = [Stream(torch.cat([stream.hidden, stream.hidden[:, 3:4]], 1), stream.calls)]
    heavy = torch.ones(9)
    heavy[3] = 2
    one = trial(layer, [stream])
    plain = losses_of(layer, twice, [one], loss)
    weighted = losses_of(layer, [stream], [Trial(one.scalable, one.candidates, [heavy])], loss)
    torch.testing.assert_close(plain, weighted)
    assert not torch.allclose(plain, losses_of(layer, [stream], [one], loss))


def test_chunks_and_ranks_sum_to_the_same_losses(monkeypatch):
    layer, streams = Block(75, 40, Scaled(75, 0.0)), streams_of((2, 5), (1, 7), (1, 3), (3, 2))
    weights = [torch.rand(n) for n in (10, 7, 3, 6)]
    one = trial(layer, streams, weights)
    together = losses_of(layer, streams, [one])
    monkeypatch.setattr(losses, "BYTES", 1)
    torch.testing.assert_close(losses_of(layer, streams, [one]), together)
    parts = [
        losses_of(layer, streams[part], [Trial(one.scalable, one.candidates, weights[part])])
        for part in (slice(0, 1), slice(1, 4), slice(4, 4))
    ]
    torch.testing.assert_close(sum(parts), together)
    assert float(together[0, -1]) == pytest.approx(float(torch.cat(weights).sum()))


def test_rounded_activations_are_rounded_after_the_division():
    layer, streams = Block(75, 40, Scaled(75, 0.0)), streams_of((2, 11), (1, 6))

    def eight(x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    def middle(model, x):
        x = model.norm(x)
        return nn.functional.silu(model.mlp.gate_proj(x)) * model.mlp.up_proj(x)

    candidates = [scales_of(torch.rand(40), ratio) for ratio in RATIOS]
    one = Trial(Scalable("mlp.up_proj", ("mlp.down_proj",), torch.arange(40), None), candidates, None)
    found = losses_of(layer, streams, [one], inputs=eight)[0]
    scales_at = dict(zip(RATIOS, candidates, strict=True)).__getitem__
    given = layer, streams, ["mlp.down_proj"], "mlp.down_proj", middle, scales_at, None, torch.abs, MINMAX
    # a value between two steps may be rounded either way: one step of 1/127 in one of 40 columns
    torch.testing.assert_close(
        found[:-1] / found[-1], torch.tensor(plain_search(*given, eight)).double(), rtol=1e-3, atol=0
    )
    assert (found[:-1] > losses_of(layer, streams, [one])[0, :-1]).any()


def test_tokens_of_no_weight_leave_a_group_unscaled():
    layer, streams = Block(75, 40, Scaled(75, 0.0)), streams_of((1, 5))
    ratios = scale(layer, 0, streams, {"mlp.down_proj": [torch.zeros(5)]}).ratios
    assert ratios["mlp.down_proj"] is None and ratios["mlp.up_proj"] is not None
