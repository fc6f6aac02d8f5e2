"""Token saliency on a real decoder layer with random weights, against the formula worked out by hand."""

import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer, Qwen2VLRotaryEmbedding

from vlmq_vllm.offline.methods.saliency.vlmq import gradient_norms, token_weights
from vlmq_vllm.offline.model.families import FAMILIES
from vlmq_vllm.offline.model.layers import holding, linears_of
from vlmq_vllm.offline.model.streams import Stream

FAMILY = FAMILIES["qwen2_vl"]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
TOKENS, HIDDEN = 11, 64


@pytest.fixture
def layer():
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(text_config=sizes | {"num_hidden_layers": 1, "rope_parameters": rope}).text_config
    config._attn_implementation = "sdpa"
    layer = Qwen2VLDecoderLayer(config, 0).requires_grad_(False).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    positions = torch.arange(TOKENS).expand(3, 1, -1)
    layer.test_kwargs = {"position_embeddings": Qwen2VLRotaryEmbedding(config)(torch.zeros(1), positions)}
    return layer


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.randn(1, TOKENS, HIDDEN)
    return full, full + 0.1 * torch.randn_like(full)


def stream(layer, hidden) -> Stream:
    return Stream(hidden, [((), layer.test_kwargs)])


def norms(layer, full, quantized, linears=ATTENTION):
    return gradient_norms(layer, 0, FAMILY, stream(layer, full), stream(layer, quantized), linears)


def attend(layer, x):
    """The attention block with its residual, written out."""
    return x + layer.self_attn(hidden_states=layer.input_layernorm(x), **layer.test_kwargs)[0]


def whole(layer, x):
    return layer(x, **layer.test_kwargs)


def test_output_projection_sees_twice_the_error(layer):
    """Z_o enters Attn(U) by addition alone, so dL/dZ_o = 2 (Attn(U) - Attn(F))."""
    full, quantized = streams()
    found = norms(layer, full, quantized)["self_attn.o_proj"]
    difference = attend(layer, quantized) - attend(layer, full)
    torch.testing.assert_close(found, (2 * difference).abs().mean(-1)[0])


def test_down_projection_sees_twice_the_error_of_the_layer(layer):
    full, quantized = streams()
    found = norms(layer, full, quantized, ATTENTION + MLP)["mlp.down_proj"]
    difference = whole(layer, quantized) - whole(layer, full)
    torch.testing.assert_close(found, (2 * difference).abs().mean(-1)[0])


@pytest.mark.parametrize("name", [*ATTENTION[:3], *MLP[:2]])
def test_gradients_equal_finite_differences(layer, name):
    """Push one channel of one token's projection by +-e in float64: the loss moves by the gradient."""
    layer = layer.double()
    layer.test_kwargs = {"position_embeddings": tuple(t.double() for t in layer.test_kwargs["position_embeddings"])}
    full, quantized = (x.double() for x in streams())
    projection, token = layer.get_submodule(name), 4
    block = attend if name in ATTENTION else whole
    target = block(layer, full)

    def loss(channel: int, push: float) -> float:
        def add(module, inputs, out):
            out = out.clone()
            out[0, token, channel] += push
            return out

        handle = projection.register_forward_hook(add)
        value = (block(layer, quantized) - target).square().sum()
        handle.remove()
        return float(value)

    step = 1e-4
    slopes = [(loss(c, step) - loss(c, -step)) / (2 * step) for c in range(projection.out_features)]
    expected = sum(map(abs, slopes)) / len(slopes)
    found = norms(layer, full, quantized, ATTENTION + MLP)[name][token]
    assert float(found) == pytest.approx(expected, rel=1e-4)  # central differences: error of order step^2


def test_each_projection_has_its_own_weights_and_nothing_is_left_behind(layer):
    full, quantized = streams()
    found = norms(layer, full, quantized)
    assert set(found) == set(ATTENTION)
    assert all(g.shape == (TOKENS,) for g in found.values())
    assert not torch.allclose(found["self_attn.q_proj"], found["self_attn.v_proj"])
    assert not any(p.grad is not None for p in layer.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def test_scope_does_not_change_the_attentions_weights(layer):
    full, quantized = streams()
    alone, together = norms(layer, full, quantized), norms(layer, full, quantized, ATTENTION + MLP)
    assert all(torch.equal(alone[name], together[name]) for name in ATTENTION)


def test_a_batch_gives_what_its_samples_give_alone(layer):
    full, quantized = (torch.cat([x, x.flip(1), 2 * x]) for x in streams())
    together = norms(layer, full, quantized, ATTENTION + MLP)
    for i in range(3):
        alone = norms(layer, full[i : i + 1], quantized[i : i + 1], ATTENTION + MLP)
        for name, g in alone.items():
            torch.testing.assert_close(together[name][i * TOKENS : (i + 1) * TOKENS], g, rtol=1e-4, atol=1e-6)


def test_later_tokens_do_not_matter_to_queries_before_the_error(layer):
    """Only the last token differs between the streams: no other token's query has any saliency."""
    full, _ = streams()
    quantized = full.clone()
    quantized[0, -1] += 1
    g = norms(layer, full, quantized)["self_attn.q_proj"]
    assert (g[:-1] == 0).all() and g[-1] > 0


def test_equal_streams_carry_no_signal_but_rounded_weights_do(layer):
    """The fallback "rtn": g_o is then twice the error that rounding this layer's weights makes at each token."""
    full, _ = streams()
    assert all((g == 0).all() for g in norms(layer, full, full, ATTENTION + MLP).values())
    rounded = {name: (8 * layer.get_submodule(name).weight).round() / 8 for name in linears_of(layer)}
    before = attend(layer, full)
    both = [stream(layer, full)] * 2
    found = gradient_norms(layer, 0, FAMILY, *both, ATTENTION, lambda: holding(layer, rounded))
    torch.testing.assert_close(attend(layer, full), before)  # the weights are back
    with holding(layer, rounded):
        difference = attend(layer, full) - before
    torch.testing.assert_close(found["self_attn.o_proj"], (2 * difference).abs().mean(-1)[0])
    assert all((g > 0).any() for g in found.values())


def test_weights_are_powers_of_the_relative_norm_within_bounds():
    found = [torch.tensor([1.0, 3.0]), torch.tensor([2.0])]
    assert [w.tolist() for w in token_weights(found, 1, 2.0)] == [[0.5, 1.5], [1.0]]
    assert [w.tolist() for w in token_weights(found, 2, 2.0)] == [[0.25, 2.25], [1.0]]
    assert [w.tolist() for w in token_weights(found, 1, 2.0, floor=0.75, cap=1.25)] == [[0.75, 1.25], [1.0]]
