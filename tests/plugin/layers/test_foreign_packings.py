"""Layers that receive other quantisers' tensors: fused, cut over ranks, reloaded. The packings themselves are compared
with their owners' in tests/plugin/test_foreign.py."""

import pytest
import torch

from vllm_layers import check, config_of, finish, load_part, qkv_layer, qkv_weights, random_weight, row_layer_of
from vlmq_vllm.foreign.compressed_tensors import PackQuantizedPacking, whole_words
from vlmq_vllm.foreign.gptq import GPTQPacking
from vlmq_vllm.format import QuantizedWeight, WeightFormat, pack


def gptq(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """As GPTQ's version 2 stores it, with zero points also where they are the middle."""
    zero = weight.zero
    if zero is None:
        zero = torch.full(weight.scale.shape, weight.format.middle, dtype=torch.uint8)
    return {
        "qweight": pack(weight.codes, weight.format.bits).T.contiguous(),
        "scales": weight.scale.T.contiguous(),
        "qzeros": pack(zero.T.contiguous(), weight.format.bits),
    }


def tens(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """As compressed-tensors before 0.18 stores 3 bits: ten codes in a word."""

    def words(codes: torch.Tensor) -> torch.Tensor:
        codes = torch.nn.functional.pad(codes.int(), (0, -codes.shape[-1] % 10)).unflatten(-1, (-1, 10))
        return (codes << 3 * torch.arange(10)).sum(-1).int()

    tensors = weight.tensors() | {"weight_packed": words(weight.codes)}
    assert tensors["weight_packed"].shape[1] == whole_words(weight.codes.shape[1], 3)
    return tensors if weight.zero is None else tensors | {"weight_zero_point": words(weight.zero.T).T}


PACKINGS = {
    "gptq": (GPTQPacking(2), gptq, (WeightFormat(4, 64, True), WeightFormat(3, 32, False), WeightFormat(2, 64, True))),
    "tens": (
        PackQuantizedPacking(frozenset(("q_proj", "k_proj", "v_proj", "fc"))),
        tens,
        (WeightFormat(3, 64, True), WeightFormat(3, 32, False), WeightFormat(3, -1, True)),
    ),
}


@pytest.fixture(params=PACKINGS)
def packing(request):
    return PACKINGS[request.param]


def load(layer, tensors: dict[str, torch.Tensor], shard=None) -> None:
    for name, tensor in tensors.items():
        load_part(layer, name, tensor, shard)


@pytest.mark.parametrize("rank", [0, 1])
def test_fused_layer_on_two_ranks(ranks, packing, rank):
    ranks(rank, 2)
    kind, store, formats = packing
    weights = qkv_weights(formats)
    config = config_of(weights)
    config.packing = kind
    layer = qkv_layer(config)
    for shard, weight in zip("qkv", weights.values(), strict=True):
        load(layer, store(weight), shard)
    halves = [weight.dequantize().chunk(2)[rank] for weight in weights.values()]
    check(finish(layer), torch.cat(halves))


@pytest.mark.parametrize("rank", [0, 1])
def test_columns_on_two_ranks(ranks, packing, rank):
    ranks(rank, 2)
    kind, store, _ = packing
    weight = random_weight(WeightFormat(3, 64, False), 40, 192)
    config = config_of({"fc": weight})
    config.packing = kind
    layer = row_layer_of(config, weight)
    load(layer, store(weight))
    check(finish(layer), weight.dequantize()[:, 96 * rank : 96 * (rank + 1)])


def test_zero_points_of_a_symmetric_weight_are_awaited_and_dropped():
    weights = qkv_weights((WeightFormat(4, 64, True),) * 3)
    config = config_of(weights)
    config.packing = GPTQPacking(2)
    layer = qkv_layer(config)
    assert layer.qzeros.numel() == 3  # one for each that must come
    for shard, weight in zip("qkv", weights.values(), strict=True):
        load(layer, {name: tensor for name, tensor in gptq(weight).items() if (shard, name) != ("k", "qzeros")}, shard)
    with pytest.raises(ValueError, match="k_proj.qzeros never arrived"):
        finish(layer)


def test_reload(packing):
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    kind, store, formats = packing
    first, second = qkv_weights(formats), qkv_weights(formats)
    config = config_of(first)
    config.packing = kind
    layer = qkv_layer(config)
    record_metadata_for_reloading(layer)
    for shard, weight in zip("qkv", first.values(), strict=True):
        load(layer, store(weight), shard)
    finish(layer)
    initialize_layerwise_reload(layer)
    for shard, weight in zip("qkv", second.values(), strict=True):
        load(layer, store(weight), shard)
    finalize_layerwise_reload(layer, model_config=None)
    check(layer, torch.cat([weight.dequantize() for weight in second.values()]))
