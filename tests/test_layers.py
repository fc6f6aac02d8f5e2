"""vLLM's own layers with the plugin's method, against the dequantised weight in float64; nothing is served.

More ranks than one are played one after the other, by patching the functions that tell a layer its rank.
"""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary
from vllm_layers import (
    FORMATS,
    W2,
    W3,
    W4,
    W8,
    check,
    column_layer,
    config_of,
    finish,
    load,
    load_part,
    load_qkv,
    qkv_layer,
    qkv_weights,
    random_weight,
    row_layer,
)

from vlmq_vllm import cpu, launch
from vlmq_vllm.format import WeightFormat


@pytest.fixture(autouse=True)
def vllm_config():
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def ranks(monkeypatch):
    """ranks(rank, size): layers built from here on believe to be this tensor-parallel rank."""

    def play(rank: int, size: int) -> None:
        for module in (vllm_linear, vllm_vocabulary, vllm_parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    play(0, 1)
    return play


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_format(ranks, format, dtype):
    weight = random_weight(format, 96, 256, dtype)
    layer = column_layer(weight, dtype, bias=False)
    load(layer, weight)
    check(finish(layer), weight.dequantize(), dtype=dtype)


@pytest.mark.parametrize(("rows", "columns"), [(33, 100), (40, 300), (171, 36)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_odd_sizes_and_bias(ranks, rows, columns, symmetric):
    weight = random_weight(WeightFormat(3, 32, symmetric), rows, columns)
    layer = column_layer(weight)
    load(layer, weight)
    check(finish(layer), weight.dequantize(), torch.randn(rows, dtype=torch.bfloat16))


def test_dense_path_is_the_same_function(ranks, monkeypatch):
    weight = random_weight(WeightFormat(3, 32, False), 96, 200)
    results = []
    for dense in ("0", "1"):
        monkeypatch.setenv("VLMQ_CPU_DENSE", dense)
        layer = column_layer(weight, bias=False)
        load(layer, weight)
        check(finish(layer), weight.dequantize())
        results.append([launch.kind for launch in layer.vlmq_launches])
    assert results == [["int4"], ["dense"]]


def test_missing_kernel_falls_back_to_dense(ranks, monkeypatch):
    monkeypatch.setattr(cpu, "_has_kernel", lambda: False)
    weight = random_weight(W4, 64, 128)
    layer = column_layer(weight, bias=False)
    load(layer, weight)
    check(finish(layer), weight.dequantize())
    assert layer.vlmq_launches[0].kind == "dense"


@pytest.mark.parametrize(
    ("formats", "parts"),
    [((W4, W3, W8), [3]), ((W4, W2, W2), [2]), ((W4, None, FORMATS[5]), [1, 0, 1])],
    ids=["widths", "k and v alike", "k at 16 bits"],
)
def test_launches_of_the_gpu_kernels(ranks, monkeypatch, formats, parts):
    """The operator's plain-torch twin runs on the CPU: same layout, same launches, same slices of outputs.

    Neighbours are one launch of so many weights; those of one format are one weight.
    """
    monkeypatch.setattr(launch.Piece, "device", torch.device("cuda"))
    weights = qkv_weights(formats)
    layer = qkv_layer(config_of(weights))
    dense = load_qkv(layer, weights)
    check(finish(layer), dense, torch.randn(256, dtype=torch.bfloat16))
    assert [len(step.parts) for step in layer.vlmq_launches] == parts
    assert [step.kind for step in layer.vlmq_launches] == ["triton" if count else "dense" for count in parts]


def test_widened_codes_are_exact():
    """Identity activations read the weight back; every value of a 16-bit scale times a small integer fits."""
    for format in FORMATS[:3] + FORMATS[4:]:
        weight = random_weight(format, 32, 64, torch.float16)
        tensors = cpu.widen([weight], torch.float16)
        bias, isa = None, cpu.isa(torch.float16)
        out = cpu.int4_linear(torch.eye(64, dtype=torch.float16), *tensors.values(), bias, 32, isa)
        assert torch.equal(out.T, weight.dequantize(torch.float16))


@pytest.mark.parametrize(
    "formats",
    [(W4, W3, W2), (W4, WeightFormat(3, 32, False), W2), (W8, W4, W8), (W4, None, W2), (None, None, W3)],
    ids=["widths", "groups and grids", "8 bits beside 4", "k at 16 bits", "v alone"],
)
def test_shards_of_different_formats(ranks, formats):
    weights = qkv_weights(formats)
    layer = qkv_layer(config_of(weights))
    dense = load_qkv(layer, weights)
    check(finish(layer), dense)


def test_merged_layer_takes_numbered_shards(ranks):
    weights = {"gate_proj": random_weight(W3, 96, 128), "up_proj": random_weight(W2, 96, 128)}
    layer = vllm_linear.MergedColumnParallelLinear(
        128, [96, 96], bias=False, params_dtype=torch.bfloat16, quant_config=config_of(weights), prefix="gate_up_proj"
    )
    for shard, weight in enumerate(weights.values()):
        load(layer, weight, shard)
    check(finish(layer), torch.cat([weight.dequantize() for weight in weights.values()]))


def test_replicated_layer_is_not_cut(ranks):
    ranks(1, 2)
    weight = random_weight(W3, 96, 128)
    layer = vllm_linear.ReplicatedLinear(
        128, 96, bias=False, params_dtype=torch.bfloat16, quant_config=config_of({"fc": weight}), prefix="fc"
    )
    load(layer, weight)
    check(finish(layer), weight.dequantize())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_output_dimension_is_cut(ranks, rank, symmetric):
    """Half of 3-bit zero points for 72 rows does not fall on a word."""
    ranks(rank, 2)
    weight = random_weight(WeightFormat(3, 32, symmetric), 72, 128)
    layer = column_layer(weight, bias=False)
    load(layer, weight)
    check(finish(layer), weight.dequantize()[36 * rank : 36 * (rank + 1)])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "format", [WeightFormat(3, 64, False), WeightFormat(4, 128, True), WeightFormat(2, -1, False)], ids=str
)
def test_input_dimension_is_cut(ranks, rank, format):
    ranks(rank, 2)
    weight = random_weight(format, 40, 256)
    layer = row_layer(weight)
    load(layer, weight)
    check(finish(layer), weight.dequantize()[:, 128 * rank : 128 * (rank + 1)])


@pytest.mark.parametrize(
    ("columns", "format", "sizes"),
    [(192, WeightFormat(4, 64, True), "1 or 3"), (192, WeightFormat(3, -1, True), "1 or 2 or 3 or 6")],
    ids=["group", "word"],
)
def test_cut_through_a_group_is_refused_with_the_sizes_that_work(ranks, columns, format, sizes):
    ranks(0, 4)
    with pytest.raises(ValueError, match=f"fc: {columns} inputs .* 4 parts of 48; .*--tensor-parallel-size {sizes},"):
        row_layer(random_weight(format, 32, columns))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["three tensors", "one tensor"])
def test_ranks_share_key_and_value_heads(ranks, rank, fused):
    """Four ranks, two key-value heads: ranks 0 and 1 hold the first, 2 and 3 the second."""
    ranks(rank, 4)
    weights = {"qkv_proj": random_weight(WeightFormat(3, 32, False), 256, 128)} if fused else qkv_weights()
    layer = qkv_layer(config_of(weights))
    for shard, weight in zip([None] if fused else "qkv", weights.values(), strict=True):
        load(layer, weight, shard)
    full = torch.cat([weight.dequantize() for weight in weights.values()])
    head = 32 * (rank // 2)
    rows = [full[32 * rank :][:32], full[128 + head :][:32], full[192 + head :][:32]]
    check(finish(layer), torch.cat(rows))


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


def test_tied_head_is_refused(ranks):
    weight = random_weight(W4, 64, 128)
    config = config_of({"lm_head": weight})
    head = vllm_vocabulary.ParallelLMHead(64, 128, quant_config=config, prefix="lm_head")
    with pytest.raises(ValueError, match="lm_head is quantised, but config.json ties it"):
        head.tie_weights(vllm_vocabulary.VocabParallelEmbedding(64, 128))


def test_quantised_embedding_is_refused(ranks):
    config = config_of({"embed_tokens": random_weight(W4, 64, 128)})
    with pytest.raises(ValueError, match="embed_tokens is an embedding"):
        vllm_vocabulary.VocabParallelEmbedding(64, 128, quant_config=config, prefix="embed_tokens")


def test_quantised_experts_are_refused():
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    config = config_of({f"mlp.experts.{i}.up_proj": random_weight(W4, 64, 128) for i in range(3)})
    experts = RoutedExperts.__new__(RoutedExperts)
    with pytest.raises(ValueError, match="mlp.experts.0.up_proj and 2 more are quantised experts"):
        config.get_quant_method(experts, "mlp.experts")
    assert config.get_quant_method(experts, "other.experts") is None


def test_layer_left_alone_stays_unquantised(ranks):
    layer = vllm_linear.ColumnParallelLinear(64, 64, quant_config=config_of({}), prefix="fc")
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_tensor_that_never_arrives_is_named(ranks, part):
    weights = qkv_weights()
    layer = qkv_layer(config_of(weights))
    for shard, (name, weight) in zip("qkv", weights.items(), strict=True):
        for key, tensor in weight.tensors().items():
            if (name, key) != ("k_proj", part):
                load_part(layer, key, tensor, shard)
    with pytest.raises(ValueError, match=f"k_proj.{part} never arrived"):
        finish(layer)


def test_tensor_that_is_not_the_expected_one_is_named(ranks):
    weight = random_weight(W4, 64, 128)
    layer = column_layer(weight)
    tensors = weight.tensors()
    for part, tensor, message in (
        (
            "weight_packed",
            tensors["weight_packed"][:, 1:],
            r"weight_packed has shape \[64, 15\], expected \[64, 16\]",
        ),
        ("weight_packed", tensors["weight_packed"].float(), "fc.weight_packed is torch.float32, expected integers"),
        ("weight_scale", tensors["weight_scale"].int(), "fc.weight_scale is torch.int32, expected a floating type"),
        ("weight_shape", torch.tensor([128, 64]), r"fc.weight_shape says \[128, 64\], expected \[64, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_part(layer, part, tensor)


def test_scale_that_is_not_finite_is_named(ranks):
    weight = random_weight(W4, 64, 128)
    weight.scale[3, 1] = float("nan")
    layer = column_layer(weight)
    load(layer, weight)
    with pytest.raises(ValueError, match="fc.weight_scale holds values that are not finite"):
        finish(layer)


def test_weight_of_another_size_is_refused(ranks):
    with pytest.raises(ValueError, match="fc: fc is 64 x 128 in the checkpoint, but vLLM builds it 32 x 128"):
        vllm_linear.ColumnParallelLinear(
            128, 32, quant_config=config_of({"fc": random_weight(W4, 64, 128)}), prefix="fc"
        )


def test_shard_of_a_tensor_fused_on_disk_is_refused(ranks):
    weight = random_weight(W4, 256, 128)
    layer = qkv_layer(config_of({"qkv_proj": weight}))
    with pytest.raises(ValueError, match="vLLM loads shard 'q' of a layer that the checkpoint stores as qkv_proj"):
        load(layer, weight, "q")


def test_dummy_weights_are_finite(ranks, vllm_config):
    vllm_config.load_config.load_format = "dummy"
    layer = qkv_layer(config_of(qkv_weights()))
    finish(layer)
    assert layer.quant_method.apply(layer, torch.randn(3, 128, dtype=torch.bfloat16)).isfinite().all()


def test_processing_twice_and_reloading_keep_names(ranks):
    """vLLM's reload: runtime tensors are replaced by the first parameters, filled, processed, and copied back."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    first, second = qkv_weights(), qkv_weights()
    layer = qkv_layer(config_of(first))
    record_metadata_for_reloading(layer)
    for shard, weight in zip("qkv", first.values(), strict=True):
        load(layer, weight, shard)
    finish(finish(layer))
    before = {name: param.data_ptr() for name, param in layer.named_parameters()}
    initialize_layerwise_reload(layer)
    for shard, weight in zip("qkv", second.values(), strict=True):
        load(layer, weight, shard)
    finalize_layerwise_reload(layer, model_config=None)
    assert {name: param.data_ptr() for name, param in layer.named_parameters()} == before
    check(layer, torch.cat([weight.dequantize() for weight in second.values()]))
