"""Layers cut over tensor-parallel ranks, which are played one after the other (`ranks` in conftest.py)."""

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary

from vllm_layers import (
    W3,
    check,
    column_layer,
    config_of,
    finish,
    load,
    qkv_layer,
    qkv_weights,
    random_weight,
    row_layer,
)
from vlmq_vllm.format import WeightFormat


def test_replicated_layer_is_not_cut(ranks):
    ranks(1, 2)
    weight = random_weight(W3, 96, 128)
    layer = vllm_linear.ReplicatedLinear(
        128, 96, bias=False, params_dtype=torch.bfloat16, quant_config=config_of({"fc": weight}), prefix="fc"
    )
    load(layer, weight)
    check(finish(layer), weight.dequantize())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_output_dimension_is_cut(ranks, rank, bits, symmetric):
    """Half of 3-bit zero points for 72 rows does not fall on a word."""
    ranks(rank, 2)
    weight = random_weight(WeightFormat(bits, 32, symmetric), 72, 128)
    layer = column_layer(weight, bias=False)
    load(layer, weight)
    check(finish(layer), weight.dequantize()[36 * rank : 36 * (rank + 1)])


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (1, 4), (3, 4), (2, 8), (7, 8)])
@pytest.mark.parametrize(
    "format",
    [WeightFormat(3, 64, False), WeightFormat(4, 128, True), WeightFormat(2, -1, False), WeightFormat(8, 64, False)],
    ids=str,
)
def test_input_dimension_is_cut(ranks, rank, size, format):
    """256 columns; eight ranks cut groups of 64 and 128 into groups of 32."""
    ranks(rank, size)
    weight = random_weight(format, 40, 256)
    layer = row_layer(weight)
    load(layer, weight)
    columns = 256 // size
    check(finish(layer), weight.dequantize()[:, columns * rank :][:, :columns])


@pytest.mark.parametrize("columns", [192, 320])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_group_on_two_ranks_gives_both_its_scale(ranks, columns, bits, symmetric):
    """Groups of 128, the last one of 64: 192 columns are cut in the first group, 320 in the second."""
    weight = random_weight(WeightFormat(bits, 128, symmetric), 40, columns)
    for rank in (0, 1):
        ranks(rank, 2)
        layer = row_layer(weight)
        assert [segment.format.group_size for segment in layer.vlmq_container.segments] == [32]
        load(layer, weight)
        check(finish(layer), weight.dequantize().chunk(2, dim=1)[rank])


@pytest.mark.parametrize(
    ("columns", "size", "format"),
    [
        (4304, 2, WeightFormat(4, -1, True)),  # SigLIP's MLP; 2152 codes of 4 bits are 269 words
        (4304, 2, WeightFormat(8, -1, False)),
        (3420, 3, WeightFormat(8, -1, True)),  # Qwen2.5-VL's vision tower; parts of 1140
        (264, 3, WeightFormat(4, -1, False)),
        (100, 1, WeightFormat(3, 32, False)),  # not cut: the last word and the last group are not full
    ],
)
def test_odd_columns_are_served_where_the_cut_falls_on_a_word(ranks, columns, size, format):
    weight = random_weight(format, 32, columns)
    for rank in range(size):
        ranks(rank, size)
        layer = row_layer(weight)
        load(layer, weight)
        check(finish(layer), weight.dequantize().chunk(size, dim=1)[rank])


@pytest.mark.parametrize(
    ("columns", "size", "format", "sizes"),
    [
        (192, 4, WeightFormat(4, 64, True), "1 or 2 or 3 or 6"),  # groups of 16 would be too fine
        (192, 4, WeightFormat(3, -1, True), "1 or 2 or 3 or 6"),  # a word ends after 32 columns
        (3420, 2, WeightFormat(4, 128, True), "1"),  # Qwen2.5-VL's vision tower; 1710 is no multiple of 8
        (4304, 2, WeightFormat(4, 128, True), "1"),  # SigLIP's MLP; 2152 and 128 have 8 in common
        (4304, 2, WeightFormat(3, -1, True), "1"),  # 2152 codes of 3 bits are 201.75 words
        (100, 2, WeightFormat(8, -1, True), "1 or 5 or 25"),  # parts of 20 and of 4 fill words of 8 bits
    ],
    ids=["group", "word", "vision tower", "SigLIP, groups", "SigLIP, 3 bits", "8 bits"],
)
def test_cut_that_cannot_be_served_is_refused_with_the_sizes_that_work(ranks, columns, size, format, sizes):
    ranks(0, size)
    message = f"fc: {columns} inputs .* {size} parts of {columns // size}; .*--tensor-parallel-size {sizes},"
    with pytest.raises(ValueError, match=message):
        row_layer(random_weight(format, 32, columns))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["three tensors", "one tensor"])
def test_ranks_share_key_and_value_heads(ranks, size, kv_heads, fused):
    """Eight query heads. Of two key-value heads the first half of the ranks hold the first, the others the second."""
    rows = (256, 32 * kv_heads, 32 * kv_heads)
    weights = qkv_weights(rows=rows)
    if fused:
        weights = {"qkv_proj": random_weight(WeightFormat(3, 32, False), sum(rows), 128)}
    query, key, value = torch.cat([weight.dequantize() for weight in weights.values()]).split(rows)
    for rank in range(size):
        ranks(rank, size)
        layer = qkv_layer(config_of(weights), heads=8, kv_heads=kv_heads)
        for shard, weight in zip([None] if fused else "qkv", weights.values(), strict=True):
            load(layer, weight, shard)
        head = rank * kv_heads // size
        shared = [part.split(32)[head] for part in (key, value)]
        check(finish(layer), torch.cat([query.chunk(size)[rank], *shared]))


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_head_with_a_padded_vocabulary(ranks, rank, size):
    """100 words become 128 rows, 64 a rank; the rows that vLLM adds evaluate to zero."""
    ranks(rank, size)
    weight = random_weight(WeightFormat(3, 32, False), 100, 128)
    head = vllm_vocabulary.ParallelLMHead(
        100, 128, params_dtype=torch.bfloat16, quant_config=config_of({"lm_head": weight}), prefix="lm_head"
    )
    load(head, weight)
    full = torch.cat([weight.dequantize(), torch.zeros(28, 128)])
    check(finish(head), full[rank * 128 // size : (rank + 1) * 128 // size])
