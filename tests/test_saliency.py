"""Token saliency on a real decoder layer with random weights, against the formula worked out by hand."""

import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer, Qwen2VLRotaryEmbedding

from vlmq_vllm.offline.models import FAMILIES
from vlmq_vllm.offline.saliency import attend, gradient_norms, token_weights

FAMILY = FAMILIES["qwen2_vl"]
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


def test_output_projection_sees_twice_the_error(layer):
    """Z_o enters Attn(U) by addition alone, so dL/dZ_o = 2 (Attn(U) - Attn(F))."""
    full, quantized = streams()
    found = gradient_norms(layer, FAMILY, full, quantized, layer.test_kwargs)["self_attn.o_proj"]
    difference = [attend(layer, FAMILY, x, layer.test_kwargs) for x in (full, quantized)]
    torch.testing.assert_close(found, (2 * (difference[1] - difference[0])).abs().mean(-1)[0])


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
def test_gradients_equal_finite_differences(layer, name):
    """Push one channel of one token's projection by +-e in float64: the loss moves by the gradient."""
    layer = layer.double()
    kwargs = {"position_embeddings": tuple(t.double() for t in layer.test_kwargs["position_embeddings"])}
    full, quantized = (x.double() for x in streams())
    projection, token = layer.get_submodule(name), 4
    target = attend(layer, FAMILY, full, kwargs)

    def loss(channel: int, push: float) -> float:
        def add(module, inputs, out):
            out = out.clone()
            out[0, token, channel] += push
            return out

        handle = projection.register_forward_hook(add)
        value = (attend(layer, FAMILY, quantized, kwargs) - target).square().sum()
        handle.remove()
        return float(value)

    step = 1e-4
    slopes = [(loss(c, step) - loss(c, -step)) / (2 * step) for c in range(projection.out_features)]
    expected = sum(map(abs, slopes)) / len(slopes)
    found = gradient_norms(layer, FAMILY, full, quantized, kwargs)[name][token]
    assert float(found) == pytest.approx(expected, rel=1e-4)  # central differences: error of order step^2


def test_each_projection_has_its_own_weights_and_nothing_is_left_behind(layer):
    full, quantized = streams()
    norms = gradient_norms(layer, FAMILY, full, quantized, layer.test_kwargs)
    assert set(norms) == set(FAMILY.weighted)
    assert all(g.shape == (TOKENS,) for g in norms.values())
    assert not torch.allclose(norms["self_attn.q_proj"], norms["self_attn.v_proj"])
    assert not any(p.grad is not None for p in layer.parameters())
    assert not any(module._forward_hooks for module in layer.modules())


def test_later_tokens_do_not_matter_to_queries_before_the_error(layer):
    """Only the last token differs between the streams: no other token's query has any saliency."""
    full, _ = streams()
    quantized = full.clone()
    quantized[0, -1] += 1
    g = gradient_norms(layer, FAMILY, full, quantized, layer.test_kwargs)["self_attn.q_proj"]
    assert (g[:-1] == 0).all() and g[-1] > 0


def test_equal_streams_carry_no_signal(layer):
    full, _ = streams()
    norms = gradient_norms(layer, FAMILY, full, full, layer.test_kwargs)
    assert all(token_weights([g], 2) is None for g in norms.values())


def test_weights_are_powers_of_the_relative_norm():
    norms = [torch.tensor([1.0, 3.0]), torch.tensor([2.0])]
    assert [w.tolist() for w in token_weights(norms, 1)] == [[0.5, 1.5], [1.0]]
    assert [w.tolist() for w in token_weights(norms, 2)] == [[0.25, 2.25], [1.0]]


def test_a_gradient_that_is_not_finite_is_no_signal():
    assert token_weights([torch.tensor([1.0, float("inf")])], 2) is None
