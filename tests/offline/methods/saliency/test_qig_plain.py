"""Token weights by integrated gradients against plain numpy and plain autograd, and the points of the path of a run."""

import copy
import functools

import numpy as np
import pytest
import torch

from coarse_rounding import coarse, coarse_tokens
from family_samples import CPU, make_samples, streams_of
from vlmq_vllm.offline.data.calibration import read_samples
from vlmq_vllm.offline.machine.progress import Progress
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.qig import QIGWeights
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import holding, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.model.targets import find_targets, find_units
from vlmq_vllm.offline.run.begin import Quantizers
from vlmq_vllm.offline.settings.quantize import Settings

PARTS = {"mlp.down_proj": "mlp.down_proj", "self_attn.k_proj": "self_attn", "mlp.gate_proj": "mlp"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Layer 1 of a tiny Qwen2-VL, its weights in multiples of 0.05, and streams as if it were the first."""
    source, _, samples = make_samples("qwen2_vl", tmp_path_factory.mktemp("model"))
    layer = source.materialise(f"{source.family.layers}.1", CPU)
    return layer, coarse(layer), streams_of(source, samples)


def calls_of(layer, stream, module):
    """(args, kwargs) of a module of layer 1."""
    seen = []
    with removing(
        [layer.get_submodule(module).register_forward_pre_hook(lambda *a: seen.append(a[1:]), with_kwargs=True)]
    ):
        stream.call(layer, 1)
    return seen[0]


def weights_by_numpy(gradients, lengths):
    """lambda of IG [N, C] of all samples, from scratch: mean |.|, clipped at Tukey's fences, the same sum for each."""
    found, start = [], 0
    for length in lengths:
        u = np.abs(gradients[start : start + length]).mean(1)
        u = u / u.sum()
        first, third = np.percentile(u, [25, 75])
        u = np.clip(u, first - 1.5 * (third - first), third + 1.5 * (third - first))
        found.append(u / u.sum() * np.mean(lengths))
        start += length
    return np.concatenate(found)


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("together", [False, True])
def test_weights_of_a_linear_alone_have_a_closed_form(linear, together, prepared):
    """IG_tc = x_tc mean_h sign(dW_h x_t) dW_hc; in batches of one sample, and of two."""
    layer, rounded, streams = prepared
    if together:
        double = torch.cat([streams[0].hidden, streams[0].hidden.flip(2)])
        kwargs = streams[0].calls[1][1]
        streams = [Stream(double, [((), {}), ((), kwargs)]), *streams[1:]]
    weights, _ = QIGWeights(Ranks(CPU))(layer, 1, [], streams, functools.partial(holding, layer, rounded))
    delta = (layer.get_submodule(linear).weight - rounded[linear]).double().numpy()
    gradients, lengths = [], []
    for stream in streams:
        (x,), _ = calls_of(layer, stream, linear)
        lengths += [x.shape[1]] * len(x)
        x = x.flatten(0, 1).double().numpy()
        gradients.append(x * (np.sign(x @ delta.T) @ delta) / len(delta))
    assert len(set(lengths)) > 1
    expected = weights_by_numpy(np.concatenate(gradients), lengths)
    # an error near 0 may have the other sign in float32; that is one of 128 rows of a token's mean
    np.testing.assert_allclose(torch.cat(weights[linear]).numpy(), expected, rtol=0.005)


class Rounding(torch.nn.Linear):
    """A linear that rounds what it gets; gradients pass as if it did not."""

    def forward(self, x):
        return torch.nn.functional.linear(x + (coarse_tokens(x) - x).detach(), self.weight, self.bias)


def rounding_copy(layer, name, rounded):
    """A copy of module `name` whose linears have rounded weights and round what they get."""
    module = copy.deepcopy(layer.get_submodule(name))
    inner = [("", module)] if isinstance(module, torch.nn.Linear) else list(module.named_modules())
    for leaf, linear in inner:
        if isinstance(linear, torch.nn.Linear):
            linear.__class__ = Rounding
            linear.weight = torch.nn.Parameter(rounded[f"{name}.{leaf}".rstrip(".")], requires_grad=False)
    return module


@pytest.mark.parametrize("linear", PARTS)
def test_rounded_activations_against_plain_autograd(linear, prepared):
    """Every linear of the inspected module rounds, on every point of the path, and the gradient goes through."""
    layer, rounded, full = prepared
    quantized = [Stream(s.hidden + 0.05 * torch.randn_like(s.hidden), s.calls) for s in full]
    weigh = QIGWeights(Ranks(CPU), coarse_tokens, steps=4)
    weights, _ = weigh(layer, 1, full, quantized, functools.partial(holding, layer, rounded))
    name, gradients = PARTS[linear], []
    original, other = layer.get_submodule(name), rounding_copy(layer, name, rounded)
    for f, q in zip(full, quantized, strict=True):
        args, kwargs = calls_of(layer, f, name)
        start_args, start_kwargs = calls_of(layer, q, name)
        end, start = (a[0] if a else k.pop("hidden_states") for a, k in ((args, kwargs), (start_args, start_kwargs)))
        total = 0
        for a in (1 / 8, 3 / 8, 5 / 8, 7 / 8):
            z = (start + a * (end - start)).requires_grad_()
            one, two = (module(z, *args[1:], **kwargs) for module in (original, other))
            one, two = (out[0] if isinstance(out, tuple) else out for out in (one, two))
            (one - two).abs().mean(-1).sum().backward()
            total = total + z.grad / 4
        gradients.append(((end - start) * total)[0].double().numpy())
    expected = weights_by_numpy(np.concatenate(gradients), [len(part) for part in gradients])
    # a value near the middle of two steps may go to either, and an error near 0 may have either sign
    np.testing.assert_allclose(torch.cat(weights[linear]).numpy(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_run_takes_32_midpoints(method, demo_model, calibration):
    """The paper's number, at the points that halve 32 equal parts of the path from zero."""
    source, settings = Source(demo_model), Settings(bits=4, group_size=64, method=method, saliency="qig", samples=1)
    samples = read_samples(calibration, source, settings, Ranks(CPU), Progress())
    units = find_units(source, settings)
    formats = {target.name: target.format for target in find_targets(source, settings, units)}
    stack = source.family.layers
    walk = Quantizers(source, settings, formats, CPU, Ranks(CPU), samples).begin("language", units, False)
    layer = source.materialise(f"{stack}.0", CPU)
    rounded = {name: (weight * 64).round() / 64 for name, weight in weights_of(layer).items()}
    (stream,) = streams = capture(source, stack, samples.batches, CPU)
    (end,) = calls_of_first(layer, stream)
    seen = []
    with removing([layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))]):
        walk.weigh(layer, 0, [], streams, functools.partial(holding, layer, rounded))
    points = [float((x * end).sum() / (end * end).sum()) for x in seen if x.shape == end.shape]
    found = sorted({round(point, 4) for point in points} - {1.0})
    assert found == pytest.approx([(k - 0.5) / 32 for k in range(1, 33)], abs=1e-4)


def calls_of_first(layer, stream):
    seen = []
    with removing([layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))]):
        stream.call(layer, 0)
    return seen
