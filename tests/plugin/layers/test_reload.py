"""Weights that vLLM loads again into a layer that has been processed, as its `reload_weights` does."""

import pytest
import torch
from vllm.model_executor.model_loader.reload import layerwise

from vllm_layers import check, config_of, finish, load, load_part, qkv_layer, qkv_weights


@pytest.fixture
def layer():
    """A layer that may be reloaded with `qkv_weights`, without any weights yet."""
    layer = qkv_layer(config_of(qkv_weights()))
    layerwise.record_metadata_for_reloading(layer)
    return layer


@pytest.fixture
def dummy_layer(vllm_config, request):
    """The same, loaded as `load_format=dummy` does it."""
    vllm_config.load_config.load_format = "dummy"
    return finish(request.getfixturevalue("layer"))


def reload(layer, weights, without: str = "") -> None:
    """All tensors of `weights` but one."""
    layerwise.initialize_layerwise_reload(layer)
    for shard, (name, weight) in zip("qkv", weights.items(), strict=True):
        for part, tensor in weight.tensors().items():
            if f"{name}.{part}" != without:
                load_part(layer, part, tensor, shard)
    layerwise.finalize_layerwise_reload(layer, model_config=None)


def dense(weights) -> torch.Tensor:
    return torch.cat([weight.dequantize() for weight in weights.values()])


def test_processing_twice_and_reloading_keep_names(layer):
    """vLLM's reload: runtime tensors are replaced by the first parameters, filled, processed, and copied back."""
    for shard, weight in zip("qkv", qkv_weights().values(), strict=True):
        load(layer, weight, shard)
    finish(finish(layer))
    before = {name: param.data_ptr() for name, param in layer.named_parameters()}
    second = qkv_weights()
    reload(layer, second)
    assert {name: param.data_ptr() for name, param in layer.named_parameters()} == before
    check(layer, dense(second))


def test_weights_take_the_place_of_dummies(dummy_layer):
    weights = qkv_weights()
    reload(dummy_layer, weights)
    check(dummy_layer, dense(weights))


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
@pytest.mark.parametrize("first", ["layer", "dummy_layer"], ids=["weights", "dummies"])
def test_tensor_missing_in_a_reload_is_named(request, first, part):
    layer = request.getfixturevalue(first)
    if first == "layer":
        for shard, weight in zip("qkv", qkv_weights().values(), strict=True):
            load(layer, weight, shard)
        finish(layer)
    with pytest.raises(ValueError, match=f"k_proj.{part} never arrived"):
        reload(layer, qkv_weights(), without=f"k_proj.{part}")
