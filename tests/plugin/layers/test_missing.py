"""What vLLM itself would not notice is missing from a quantised checkpoint: it tracks loaded tensors of others only."""

from contextlib import nullcontext

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

from vllm_layers import W3, W4, column_layer, config_of, finish, load, random_weight


def test_bias_that_no_file_has_is_named():
    weight = random_weight(W4, 64, 128)
    layer = column_layer(weight)
    layer.quant_method.config.biased.clear()
    load(layer, weight)
    with pytest.raises(ValueError, match="fc.bias is missing, vLLM builds this layer with one"):
        finish(layer)


def test_bias_that_is_not_finite_is_named():
    weight = random_weight(W4, 64, 128)
    layer = column_layer(weight)
    layer.bias.data[5] = float("inf")
    load(layer, weight)
    with pytest.raises(ValueError, match="fc.bias holds values that are not finite"):
        finish(layer)


def build(config, prefix: str):
    return vllm_linear.ColumnParallelLinear(64, 64, bias=False, quant_config=config, prefix=prefix)


@pytest.mark.parametrize("known", [True, False])
def test_layer_without_any_tensor_is_named(known):
    """In a family that is known by name; elsewhere the name may only not have been understood."""
    config = config_of({"fc": random_weight(W3, 64, 64)})
    config.plain, config.known = {"proj", "norm"}, known
    for prefix in ("fc", "proj", "gone"):
        build(config, prefix)
    message = "the checkpoint has no weight for 1 of vLLM's layers: gone"
    with pytest.raises(ValueError, match=message) if known else nullcontext():
        config.check_complete()


def test_part_of_a_fused_layer_without_a_tensor_is_named():
    config = config_of({"fc": random_weight(W3, 64, 64)})
    config.plain, config.known = {"q_proj", "v_proj"}, True
    build(config, "fc")
    vllm_linear.QKVParallelLinear(64, 32, 2, 1, bias=False, quant_config=config, prefix="qkv_proj")
    with pytest.raises(ValueError, match="no weight for 1 of vLLM's layers: qkv_proj"):
        config.check_complete()


def test_scales_that_vanish_in_the_models_dtype_are_named():
    """1e-9 is a number in bfloat16 and float32, and zero in float16."""
    weight = random_weight(W4, 64, 128, torch.float32)
    weight.scale[3, 1] = 1e-9
    layer = column_layer(weight, torch.float16, bias=False)
    with pytest.raises(ValueError, match="fc.weight_scale holds scales that are too small for torch.float16"):
        load(layer, weight)
