"""What a layer refuses: tensors that are missing, wrong or too many, and layers that cannot be quantised."""

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary

from vllm_layers import (
    W4,
    column_layer,
    config_of,
    finish,
    load,
    load_part,
    qkv_layer,
    qkv_weights,
    random_weight,
)
from vlmq_vllm.serving import launch


def test_tied_head_is_refused():
    weight = random_weight(W4, 64, 128)
    config = config_of({"lm_head": weight})
    head = vllm_vocabulary.ParallelLMHead(64, 128, quant_config=config, prefix="lm_head")
    with pytest.raises(ValueError, match="lm_head is quantised, but config.json ties it"):
        head.tie_weights(vllm_vocabulary.VocabParallelEmbedding(64, 128))


def test_quantised_embedding_is_refused():
    config = config_of({"embed_tokens": random_weight(W4, 64, 128)})
    with pytest.raises(ValueError, match="embed_tokens is an embedding"):
        vllm_vocabulary.VocabParallelEmbedding(64, 128, quant_config=config, prefix="embed_tokens")


def test_layer_left_alone_stays_unquantised():
    layer = vllm_linear.ColumnParallelLinear(64, 64, quant_config=config_of({}), prefix="fc")
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_tensor_that_never_arrives_is_named(part):
    weights = qkv_weights()
    layer = qkv_layer(config_of(weights))
    for shard, (name, weight) in zip("qkv", weights.items(), strict=True):
        for key, tensor in weight.tensors().items():
            if (name, key) != ("k_proj", part):
                load_part(layer, key, tensor, shard)
    with pytest.raises(ValueError, match=f"k_proj.{part} never arrived"):
        finish(layer)


def test_tensor_that_is_not_the_expected_one_is_named():
    weight = random_weight(W4, 64, 128)
    layer = column_layer(weight)
    tensors = weight.tensors()
    for part, tensor, message in (
        (
            "weight_packed",
            tensors["weight_packed"][:, 1:],
            r"weight_packed has shape \[64, 15\], expected \[64, 16\]",
        ),
        ("weight_packed", tensors["weight_packed"].float(), "fc.weight_packed is torch.float32, expected torch.int32"),
        ("weight_scale", tensors["weight_scale"].int(), "fc.weight_scale is torch.int32, expected torch.float16"),
        ("weight_shape", torch.tensor([128, 64]), r"fc.weight_shape says \[128, 64\], expected \[64, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_part(layer, part, tensor)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(launch.Piece, "device", torch.device("cuda"))
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    weight = random_weight(W4, 64, 128)
    layer = column_layer(weight)
    load(layer, weight)
    with pytest.raises(RuntimeError, match="need Triton, which is not installed; pip install triton"):
        finish(layer)


def test_processed_weights_of_another_process_are_refused_by_vllm():
    """vLLM 0.32's weight cache asks every method; ours says no, as layouts differ between devices."""
    layer = column_layer(random_weight(W4, 64, 128))
    protocol = pytest.importorskip("vllm.model_executor.model_loader.weight_cache.protocol")
    with pytest.raises(protocol.UnsupportedQuantForIPCError, match="VLMQLinearMethod does not support"):
        protocol.check_ipc_quant_support(layer)


def test_quantised_experts_beside_constant_ones_are_refused():
    """vLLM 0.33 serves experts that were pruned to constants; quantised ones it would refuse in words of its own."""
    layers = pytest.importorskip("vllm.model_executor.layers.fused_moe.expert_substitution", reason="vLLM before 0.33")
    layer = object.__new__(layers.SubstitutedRoutedExperts)
    weights = {f"experts.0.{name}_proj": random_weight(W4, 64, 64) for name in ("gate", "up", "down")}
    with pytest.raises(
        ValueError, match="experts: config.json replaces experts of this layer by constants .*without ex"
    ):
        config_of(weights).get_quant_method(layer, "experts.routed_experts")


def test_scale_that_is_not_finite_is_named():
    weight = random_weight(W4, 64, 128)
    weight.scale[3, 1] = float("nan")
    layer = column_layer(weight)
    load(layer, weight)
    with pytest.raises(ValueError, match="fc.weight_scale holds values that are not finite"):
        finish(layer)


def test_weight_of_another_size_is_refused():
    with pytest.raises(ValueError, match="fc: fc is 64 x 128 in the checkpoint, but vLLM builds it 32 x 128"):
        vllm_linear.ColumnParallelLinear(
            128, 32, quant_config=config_of({"fc": random_weight(W4, 64, 128)}), prefix="fc"
        )


def test_shard_of_a_tensor_fused_on_disk_is_refused():
    weight = random_weight(W4, 256, 128)
    layer = qkv_layer(config_of({"qkv_proj": weight}))
    with pytest.raises(ValueError, match="vLLM loads shard 'q' of a layer that the checkpoint stores as qkv_proj"):
        load(layer, weight, "q")
