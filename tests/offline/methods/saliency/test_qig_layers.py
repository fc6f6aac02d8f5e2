"""Integrated gradients of whole layers of families: completeness, positions, groups, batches, rounded activations."""

import dataclasses
import functools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_map

from coarse_rounding import coarse, coarse_tokens, completeness
from family_samples import CPU, make_samples, streams_of
from vlmq_vllm.activations import round_tokens
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.qig import QIGWeights, input_of, integrated_gradients, token_weights
from vlmq_vllm.offline.model.groups import find_stages, inspected
from vlmq_vllm.offline.model.hooks import removing, rounding_inputs
from vlmq_vllm.offline.model.layers import holding, linears_of, weights_of
from vlmq_vllm.offline.model.streams import Stream


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name: (source, samples) of a family's tiny model."""

    @functools.cache
    def make(name):
        source, _, samples = make_samples(name, tmp_path_factory.mktemp(name))
        return source, samples

    return make


@pytest.fixture
def opened(made):
    """By name: layer 1 of a family's decoder, the streams in front of it as if it were the first, (full, quantized)."""
    held = []

    def open_(name, index=1):
        source, samples = made(name)
        layer = source.materialise(f"{source.family.layers}.{index}", CPU)
        held.append((source, f"{source.family.layers}.{index}"))
        full = streams_of(source, samples)
        quantized = [Stream(s.hidden + 0.05 * torch.randn_like(s.hidden), s.calls, s.terms) for s in full]
        return layer, full, quantized

    yield open_
    for source, name in held:
        source.release(name)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("module", ["self_attn", "mlp"])
def test_gradients_of_a_layers_modules_sum_up_to_the_difference(name, module, opened):
    """With the model's own positions and masks, which belong to the call. What 4 points lack is at most
    0.007 of the error itself, what 32 lack 0.0002 (measured).
    """
    layer, full, _ = opened(name)
    rounded = coarse(layer)
    call = full[0].call_of(layer, 1, module)
    switch = functools.partial(holding, layer, rounded)
    inner = layer.get_submodule(module)
    moved = completeness(inner, switch, call, torch.zeros(1))
    for steps, share in ((4, 0.02), (32, 0.001)):
        found = integrated_gradients(inner, switch, call, None, steps)
        assert abs(completeness(inner, switch, call, found)) < share * abs(moved)
    if module == "self_attn":
        given = full[0].calls[1][1]
        assert call[1]["position_embeddings"] is given["position_embeddings"]
        assert call[1]["attention_mask"] is given["attention_mask"]


def test_rows_for_columns_give_other_gradients(made, opened):
    """The call's M-RoPE positions are what attention runs on: exchange rows and columns of a picture of 4 x 2 tokens in
    them, and gradients move. With positions as in a text (time, row and column equal) they would not.
    """
    rotary, seen = made("qwen2_vl")[0].model.get_submodule("model.language_model.rotary_emb"), []

    def see(module, args, kwargs):
        seen.append((*args, *kwargs.values())[1])

    with removing([rotary.register_forward_pre_hook(see, with_kwargs=True)]):
        layer, full, _ = opened("qwen2_vl")
    time, rows, columns = seen[1]  # [1, T] each
    assert (rows - time)[0, 7:15].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (columns - time)[0, 7:15].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    args, kwargs = full[1].call_of(layer, 1, "self_attn")
    switch = functools.partial(holding, layer, coarse(layer))

    def gradients(*positions):
        other = kwargs | {"position_embeddings": rotary(full[1].hidden, torch.stack(positions))}
        return integrated_gradients(layer.self_attn, switch, (args, other), None, 4)

    found = integrated_gradients(layer.self_attn, switch, (args, kwargs), None, 4)
    assert torch.equal(found, gradients(time, rows, columns))
    moved = gradients(time, columns, rows) - found
    assert moved.norm() > 0.005 * found.norm()  # seen: 0.018; without rows and columns exactly 0


def test_modules_by_which_groups_are_judged():
    assert inspected(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")) == "self_attn"
    assert inspected(("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")) == "mlp.experts.3"
    assert inspected(("mlp.down_proj",)) == "mlp.down_proj"


def test_a_layers_groups_share_a_list_each(opened):
    """In float64: in float32 an output whose error is smaller than its sums' rounding has a sign of its own at every
    point of the path, and that moves its token's weight by some thousandths on one processor and not on another.
    """
    layer, full, quantized = opened("qwen3_vl")
    layer.double()
    full, quantized = (list(map(in_float64, streams)) for streams in (full, quantized))
    before = weights_of(layer)
    rounded = coarse(layer)
    entered = []

    @contextmanager
    def rounding():
        entered.append(1)
        with holding(layer, rounded):
            yield

    weights, notes = QIGWeights(Ranks(CPU), steps=3)(layer, 1, full, quantized, rounding)
    assert len(entered) == 1  # rounding a layer is not cheap
    assert all(layer.get_submodule(name).weight is weight for name, weight in before.items())
    assert notes == dict.fromkeys(linears_of(layer), "saliency") and weights.keys() == notes.keys()
    groups = [group for stage in find_stages(layer, 1, quantized[0]) for group in stage]
    assert len({id(found) for found in weights.values()}) == len(groups) == 4
    for group in groups:
        assert all(weights[name] is weights[group[0]] for name in group)
    length = sum(stream.hidden.shape[1] for stream in quantized) / len(quantized)  # one sample each
    for i, stream in enumerate(quantized):
        for group in groups:
            name = inspected(group)
            call = stream.call_of(layer, 1, name)
            # down_proj's and o_proj's own error is linear along the path: all numbers of points agree
            steps = 3 if len(group) > 1 else 5
            inner, own = layer.get_submodule(name), functools.partial(holding, layer, rounded)
            expected, _ = token_weights(integrated_gradients(inner, own, call, None, steps), 1)
            expected *= length
            torch.testing.assert_close(weights[group[0]][i], expected, rtol=1e-3, atol=1e-4)
            assert expected.std() > 0.05


def in_float64(stream):
    """The stream with its states, positions and masks in float64."""

    def convert(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return Stream(convert(stream.hidden), tree_map(convert, stream.calls), tree_map(convert, stream.terms))


def test_weights_do_not_depend_on_the_batch(opened):
    """A batch of two samples gives what each gives alone."""
    layer, full, quantized = opened("qwen2_vl")
    one = quantized[0]
    other = Stream(one.hidden.flip(2), one.calls)

    def doubled(value):
        return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.shape[:1] == (1,) else value

    args, kwargs = one.calls[1]
    assert not args
    kwargs = {
        key: tuple(map(doubled, value)) if isinstance(value, tuple) else doubled(value) for key, value in kwargs.items()
    }
    both = Stream(torch.cat([one.hidden, other.hidden]), [((), {}), ((), kwargs)])
    weigh = QIGWeights(Ranks(CPU), steps=4)
    rounding = functools.partial(holding, layer, coarse(layer))
    together, _ = weigh(layer, 1, full[:1], [both], rounding)
    alone, _ = weigh(layer, 1, full[:1] * 2, [one, other], rounding)
    for name, weights in together.items():
        # an output near no error at all may take the other sign of | | under other kernels
        torch.testing.assert_close(weights[0], torch.cat(alone[name]), rtol=0.01, atol=0.01)


def test_activations_are_rounded_on_a_path_from_the_quantised_input(opened):
    """Z0 is the quantised stream's input, Z1 the full one's; rounding is passed straight through. With weights left as
    they are, the error of a linear is W (z - round(z)), whose gradient by that rule is 0: nothing but M - Mq counts.
    """
    layer, full, quantized = opened("qwen2_vl")
    rounded = coarse(layer)
    weigh = QIGWeights(Ranks(CPU), coarse_tokens, steps=4)
    weights, notes = weigh(layer, 1, full, quantized, functools.partial(holding, layer, rounded))
    assert set(notes.values()) == {"saliency"}
    down = layer.mlp.down_proj
    expected = []
    for f, q in zip(full, quantized, strict=True):
        end, start = (input_of(stream.call_of(layer, 1, "mlp.down_proj")) for stream in (f, q))
        total = torch.zeros_like(end)
        for a in (0.125, 0.375, 0.625, 0.875):
            z = start + a * (end - start)
            error = z @ down.weight.T - coarse_tokens(z) @ rounded["mlp.down_proj"].T
            total += torch.sign(error) @ (down.weight - rounded["mlp.down_proj"]) / down.out_features / 4
        expected.append(token_weights(((end - start) * total).flatten(0, -2), 1)[0])
    length = sum(map(len, expected)) / len(expected)
    for found, wanted in zip(weights["mlp.down_proj"], expected, strict=True):
        torch.testing.assert_close(found, length * wanted, rtol=0.01, atol=0.01)
    assert not any(module._forward_pre_hooks for module in layer.modules())

    same, notes = weigh(layer, 1, full, full, functools.partial(holding, layer, rounded))
    assert same == {} and set(notes.values()) == {"no signal"}  # no path, as in front of the first layer


def test_a_rounded_stream_gives_a_linears_input_as_it_comes(opened):
    """Its other linears' inputs are rounded on the way; that of the linear itself is rounded by the path's own rule."""
    layer, full, _ = opened("qwen2_vl")
    linears = [layer.get_submodule(name) for name in linears_of(layer)]
    stream = dataclasses.replace(full[0], rounded=frozenset(linears))
    seen = []
    with rounding_inputs(linears), removing([layer.mlp.act_fn.register_forward_hook(lambda m, a, o: seen.append(o))]):
        full[0].call(layer, 1)
    up = []
    with rounding_inputs(linears), removing([layer.mlp.up_proj.register_forward_hook(lambda m, a, o: up.append(o))]):
        full[0].call(layer, 1)
    found = input_of(stream.call_of(layer, 1, "mlp.down_proj"))
    torch.testing.assert_close(found, seen[0] * up[0])
    assert not torch.equal(found, round_tokens(found))
    assert torch.equal(input_of(stream.call_of(layer, 1, "mlp.up_proj")), input_of(stream.call_of(layer, 1, "mlp")))


def test_linears_that_are_not_rounded_have_no_signal(opened):
    """Some stay at 16 bits: what their module does alike has no error, and their inputs are not rounded."""
    layer, full, quantized = opened("qwen2_vl")
    rounded = {name: weight for name, weight in coarse(layer).items() if name.startswith("mlp.")}
    weigh = QIGWeights(Ranks(CPU), steps=2)
    weights, notes = weigh(layer, 1, full, quantized, functools.partial(holding, layer, rounded))
    assert weights.keys() == set(rounded)
    assert {name for name, note in notes.items() if note == "no signal"} == set(linears_of(layer)) - set(rounded)


def test_experts_count_tokens_alike(made):
    source, samples = made("qwen3_vl_moe")
    layer = source.materialise(f"{source.family.layers}.1", CPU)
    streams = streams_of(source, samples[:1])
    rounding = functools.partial(holding, layer, coarse(layer))
    weights, notes = QIGWeights(Ranks(CPU), steps=2)(layer, 1, streams, streams, rounding)
    source.release(f"{source.family.layers}.1")
    assert weights.keys() == {f"self_attn.{part}_proj" for part in "qkvo"}
    experts = [name for name, note in notes.items() if note == "equal"]
    assert len(experts) == 18 and all("experts" in name for name in experts)
