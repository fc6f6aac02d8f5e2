"""AWQ's channel scales: what can be scaled in every family and what cannot, and folding without loss."""

import functools
import json

import pytest
import torch
from PIL import Image
from torch import nn

from family_models import FAMILIES, build
from scaled_blocks import CPU, FORMAT, GATE_UP, QKV, Block, Scaled, bfloat16, scale, streams_of
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.inputs import load_processor, model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.methods.awq.fold import effective, fold
from vlmq_vllm.offline.methods.awq.scalable import Scalable, find_scalable
from vlmq_vllm.offline.methods.awq.search import RATIOS, scales_of
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import MINMAX
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.groups import find_stages, inspected
from vlmq_vllm.offline.model.layers import holding, is_clipped, linears_of, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

# By group: what is divided for it, and the offset of the norm's weight. Rows that differ from DENSE are in the table.
DENSE = {
    QKV: ("input_layernorm", 0.0),
    ("self_attn.o_proj",): ("self_attn.v_proj", None),
    GATE_UP: ("post_attention_layernorm", 0.0),
    ("mlp.down_proj",): ("mlp.up_proj", None),
}
EXPERTS = {QKV: DENSE[QKV], ("self_attn.o_proj",): DENSE[("self_attn.o_proj",)]} | {
    (f"mlp.experts.{i}.down_proj",): (f"mlp.experts.{i}.up_proj", None) for i in range(6)
}
GEMMA = DENSE | {QKV: ("input_layernorm", 1.0), GATE_UP: ("pre_feedforward_layernorm", 1.0)}
TABLE = {"gemma3": (GEMMA, GEMMA), "qwen3_vl_moe": (DENSE, EXPERTS)}
BIASED = {"qwen2_vl", "qwen2_5_vl", "llava_onevision", "internvl"}  # families with a bias on v


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: the source of a tiny model, and streams in front of its first layer."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        build(name, folder / "model")
        lines = []
        for i in range(3):
            # Pillow's noise follows no seed: pictures would depend on what ran before in the process
            noise = 128 + 64 * torch.randn(56, 56 + 28 * (i % 2), generator=torch.Generator().manual_seed(i))
            Image.fromarray(noise.clamp(0, 255).byte().numpy()).convert("RGB").save(folder / f"{i}.png")
            asked = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"What is this {i}?"}]
            lines.append(json.dumps({"messages": [{"role": "user", "content": asked}]}))
        (folder / "chats.jsonl").write_text("\n".join(lines))
        source = Source(folder / "model")
        chats = read_chats(folder / "chats.jsonl", 0)
        inputs = [inputs for _, inputs in model_inputs(chats, load_processor(folder / "model"), 8, 2048)]
        return source, capture(source, source.family.layers, batched(inputs), CPU)

    return functools.cache(make)


def in_front_of(source: Source, streams: list[Stream], index: int) -> tuple[nn.Module, list[Stream]]:
    """Layer `index`, and streams in front of it."""
    moved = [Stream(stream.hidden, stream.calls, stream.terms) for stream in streams]
    for i in range(index):
        layer = source.materialise(f"{source.family.layers}.{i}", CPU)
        for stream in moved:
            stream.hidden = stream.run(layer, i)
    return source.materialise(f"{source.family.layers}.{index}", CPU), moved


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families_fold_without_a_change_of_function(name, index, models):
    """Every group of the table, by random scales of 1/4 to 4; the layer's outputs stay, all its weights move."""
    source, streams = models(name)
    layer, streams = in_front_of(source, streams, index)
    stages = find_stages(layer, index, streams[0])
    before = [stream.call(layer, index) for stream in streams]
    weights, values = weights_of(layer), {name: p.clone() for name, p in layer.named_parameters()}
    found = [scalable for stage in stages for scalable in find_scalable(layer, stage, source.family)]
    assert {one.linears: (one.source, one.offset) for one in found} == TABLE.get(name, (DENSE, DENSE))[index]
    named = {}
    for scalable in found:
        scales, changed = effective(
            layer, scalable, 4 ** (2 * torch.rand(len(scalable.channel.unique())) - 1), bfloat16
        )
        fold(layer, scalable, scales, changed)
        named |= changed
    for stream, expected in zip(streams, before, strict=True):
        # float32 rounding of the same products; a wrong channel or a forgotten bias moves the output by percents
        assert (stream.call(layer, index) - expected).abs().max() < 1e-5 * expected.abs().max()
    for linear in linears_of(layer):
        unmoved = "experts" in linear and "gate_proj" in linear
        assert torch.equal(layer.get_submodule(linear).weight, weights[linear]) == unmoved
    expected = {source for source, offset in TABLE.get(name, (DENSE, DENSE))[index].values() if offset is not None}
    assert named.keys() == {f"{norm}.weight" for norm in expected} | (
        {"self_attn.v_proj.bias"} if name in BIASED else set()
    )
    for changed, value in named.items():
        assert torch.equal(value, value.bfloat16().float()) and not torch.equal(value, values[changed])
    assert all(torch.equal(weights[linear], values[f"{linear}.weight"]) for linear in weights)  # never written to


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "qwen3_vl_moe"])
def test_a_scaled_layer_keeps_its_function_and_tells_what_changed(name, models):
    layer, streams = in_front_of(*models(name), 1)
    with torch.no_grad():
        before = [stream.call(layer, 1) for stream in streams]
    found = scale(layer, 1, streams, family=models(name)[0].family)
    with torch.no_grad():
        for stream, expected in zip(streams, before, strict=True):
            assert (stream.call(layer, 1) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert found.ratios.keys() == set(linears_of(layer))
    scaled = {linear for linears in TABLE.get(name, (DENSE, DENSE))[1] for linear in linears}
    assert {linear for linear, ratio in found.ratios.items() if ratio is not None} == scaled
    assert len(set(found.ratios.values())) > 2
    parameters = dict(layer.named_parameters())
    for inner, value in found.changed.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value.float(), parameters[inner])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_attention_is_judged_as_a_whole(name, models):
    """The exponent for q, k and v by plain loops over the attention's own output, with its masks and positions."""
    layer, streams = in_front_of(*models(name), 1)
    norm, offset = layer.input_layernorm, 1.0 if name == "gemma3" else 0.0
    mean = torch.cat([norm(stream.hidden).abs().flatten(0, 1) for stream in streams]).mean(0)
    losses = []
    for ratio in RATIOS:
        stored = ((norm.weight + offset) / scales_of(mean, ratio) - offset).bfloat16().float()
        scales, error, tokens = (norm.weight + offset) / (stored + offset), 0.0, 0
        weights = {}
        for linear in QKV:
            code = round_to_nearest(layer.get_submodule(linear).weight * scales, FORMAT, torch.bfloat16, MINMAX)
            weights[linear] = code.dequantize(torch.bfloat16).float() / scales
        for stream in streams:
            args, kwargs = stream.calls[1]
            full = layer.self_attn(norm(stream.hidden), *args, **kwargs)[0]
            with holding(layer, weights):
                part = layer.self_attn(norm(stream.hidden), *args, **kwargs)[0]
            error, tokens = error + float((part - full).abs().mean(-1).double().sum()), tokens + full[..., 0].numel()
        losses.append(error / tokens)
    found = scale(layer, 1, streams, family=models(name)[0].family).ratios
    assert [found[linear] for linear in QKV] == [RATIOS[losses.index(min(losses))]] * 3
    first, second = sorted(losses)[:2]
    assert second > first * (1 + 1e-6)  # what float32 sums may move


def test_columns_that_share_a_value_head_share_their_scale(models):
    """Two query heads of 32 channels read one value head; its m is the mean over both."""
    layer, streams = in_front_of(*models("llava"), 0)
    heads = []
    with torch.no_grad():
        for stream in streams:
            stream.inputs_of(layer, 0, ["self_attn.o_proj"], lambda name, x: heads.append(x.abs()))
    mean = torch.cat(heads).mean(0).view(2, 2, 32).mean(1).flatten()
    weight = layer.self_attn.o_proj.weight
    ratio = scale(layer, 0, streams, family=models("llava")[0].family).ratios["self_attn.o_proj"]
    scales = (layer.self_attn.o_proj.weight.abs().sum(0) / weight.abs().sum(0)).view(2, 2, 32)
    assert ratio > 0
    torch.testing.assert_close(scales[:, 0], scales[:, 1])
    torch.testing.assert_close(scales[:, 0].flatten(), scales_of(mean, ratio), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_folded_with_scales_that_their_rounding_makes_exact(offset, dtype):
    layer, wanted = Block(75, 40, Scaled(75, offset)), 4 ** (2 * torch.rand(75) - 1)
    norm = layer.norm
    norm.weight.copy_(norm.weight.to(dtype).float())
    # a channel that is off, and one that rounding would turn off
    norm.weight[3], norm.weight[4], wanted[4] = -offset, (1e-4 if offset else 1e-41) - offset, 2.0
    scalable = Scalable("norm", GATE_UP, torch.arange(75), offset)
    scales, changed = effective(layer, scalable, wanted, lambda name: dtype)
    stored = changed["norm.weight"]
    assert torch.equal(stored[5:], stored[5:].to(dtype).float())
    assert torch.equal(scales[3:5], torch.ones(2)) and torch.equal(stored[3:5], norm.weight[3:5])
    # one rounding of the quotient: s_eff new == old
    torch.testing.assert_close(scales * (stored + offset), norm.weight + offset, rtol=2.4e-7, atol=0)
    if offset == 0:  # half a unit in the last place of 8 or 11 bits; beside an offset the stored part may be larger
        error = (scales / wanted - 1).abs()[5:]
        assert error.max() < 2 * torch.finfo(dtype).eps and (error > 0).any()


def test_biases_of_a_linear_in_front_are_exact_too():
    layer = Block(75, 40, nn.LayerNorm(75), bias=True)
    layer.mlp.up_proj.bias[7] = 0
    wanted = 4 ** (2 * torch.rand(40) - 1)
    scales, changed = effective(
        layer, Scalable("mlp.up_proj", ("mlp.down_proj",), torch.arange(40), None), wanted, bfloat16
    )
    bias = changed["mlp.up_proj.bias"]
    assert torch.equal(bias, bias.bfloat16().float()) and scales[7] == wanted[7] and bias[7] == 0
    torch.testing.assert_close(scales * bias, layer.mlp.up_proj.bias, rtol=2.4e-7, atol=0)


def test_layer_norms_are_folded_with_their_bias():
    layer, streams = Block(75, 40, nn.LayerNorm(75), bias=True), streams_of((2, 30))
    before, bias = layer(streams[0].hidden), layer.norm.bias.clone()
    found = scale(layer, 0, streams)
    assert found.changed.keys() == {"norm.weight", "norm.bias", "mlp.up_proj.bias"}
    assert not torch.equal(layer.norm.bias, bias) and torch.equal(layer.norm.bias, found.changed["norm.bias"].float())
    # the bias alone is not exact: 2^-9 of it, which goes through linears of a size of about 2
    assert (layer(streams[0].hidden) - before).abs().max() < 2e-2 * before.abs().max()


class Shared(Block):
    """Somebody else reads the norm's output too."""

    def forward(self, x):
        normed = self.norm(x)
        return x + self.mlp(normed) + 0.1 * normed


class Squared(Block):
    """down reads what is no multiple of up."""

    def inner(self, x):
        return self.mlp.down_proj(self.mlp.gate_proj(x).tanh() + self.mlp.up_proj(x).square())


@pytest.mark.parametrize("kind", [Shared, Squared])
def test_layers_that_are_joined_in_another_way_are_refused(kind):
    with pytest.raises(QuantizeError, match="scaling layer 0 moved its output .* please report it"):
        scale(kind(75, 40, Scaled(75, 0.0)), 0, streams_of((2, 11)))


class Squashed(Scaled):
    """No norm whose output goes with its weight."""

    def forward(self, x):
        return super().forward(x).tanh()


def test_norms_of_another_kind_are_left_alone():
    layer, streams = Block(75, 40, Squashed(75, 0.0)), streams_of((2, 11))
    ratios = scale(layer, 0, streams).ratios
    assert ratios["mlp.gate_proj"] is ratios["mlp.up_proj"] is None and ratios["mlp.down_proj"] is not None


@pytest.mark.parametrize("stage", [[("self_attn.q_proj", "self_attn.v_proj")], [("mlp.gate_proj",)]])
def test_a_norm_that_a_kept_linear_reads_too_is_left_alone(stage, models):
    source, _ = models("llava")
    layer = source.materialise(f"{source.family.layers}.0", CPU)
    assert find_scalable(layer, stage, source.family) == []


def test_groups_with_a_linear_that_is_kept_are_left_alone():
    layer, streams = Block(75, 40, Scaled(75, 0.0)), streams_of((2, 11))
    weights = weights_of(layer)
    found = scale(layer, 0, streams, format_of=lambda linear: None if linear == "mlp.up_proj" else FORMAT)
    assert set(found.ratios.values()) == {None} and not found.changed
    assert all(layer.get_submodule(linear).weight is weight for linear, weight in weights.items())


def test_groups_are_judged_by_their_common_parent():
    assert inspected(QKV) == "self_attn" and inspected(GATE_UP) == "mlp"
    assert inspected(("mlp.down_proj",)) == "mlp.down_proj" and inspected(("a.q.linear", "a.k.linear")) == "a"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_makes_queries_and_keys_is_not_clipped(name, models):
    """In decoder, tower and connectors, the fused linears of Qwen's towers among them; all else is."""
    source, _ = models(name)
    parts = source.family.layers, source.family.vision, *source.family.connectors
    linears = {linear for part in parts for linear in linears_of(source.model.get_submodule(part))}
    assert {linear.rpartition(".")[2] for linear in linears if not is_clipped(linear)} == {"q_proj", "k_proj"} | (
        {"qkv"} if name.startswith("qwen") else set()
    )
