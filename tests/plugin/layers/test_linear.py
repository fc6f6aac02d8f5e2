"""vLLM's own layers with the plugin's method, against the dequantised weight in float64; nothing is served."""

import inspect

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.fused_moe import GateLinear

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
    load_qkv,
    qkv_layer,
    qkv_weights,
    random_weight,
)
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.serving import cpu, launch


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_format(format, dtype):
    weight = random_weight(format, 96, 256, dtype)
    layer = column_layer(weight, dtype, bias=False)
    load(layer, weight)
    check(finish(layer), weight.dequantize(), dtype=dtype)


@pytest.mark.parametrize(("rows", "columns"), [(33, 100), (40, 300), (171, 36)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_odd_sizes_and_bias(rows, columns, symmetric):
    weight = random_weight(WeightFormat(3, 32, symmetric), rows, columns)
    layer = column_layer(weight)
    load(layer, weight)
    check(finish(layer), weight.dequantize(), torch.randn(rows, dtype=torch.bfloat16))


def test_dense_path_is_the_same_function(monkeypatch):
    weight = random_weight(WeightFormat(3, 32, False), 96, 200)
    results = []
    for dense in ("0", "1"):
        monkeypatch.setenv("VLMQ_CPU_DENSE", dense)
        layer = column_layer(weight, bias=False)
        load(layer, weight)
        check(finish(layer), weight.dequantize())
        results.append([launch.kind for launch in layer.vlmq_launches])
    assert results == [["int4"], ["dense"]]


def test_missing_kernel_falls_back_to_dense(monkeypatch):
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
def test_launches_of_the_gpu_kernels(monkeypatch, formats, parts):
    """The operator's plain-torch twin runs on the CPU: same layout, same launches, same slices of outputs.

    Neighbours are one launch of so many weights; those of one format are one weight.
    """
    monkeypatch.setattr(launch.Piece, "device", torch.device("cuda"))
    weights = qkv_weights(formats)
    layer = qkv_layer(config_of(weights))
    dense = load_qkv(layer, weights)
    check(finish(layer), dense, torch.randn(256, dtype=torch.bfloat16))
    assert [len(step.weights) for step in layer.vlmq_launches] == parts
    assert [step.kind for step in layer.vlmq_launches] == ["triton" if count else "dense" for count in parts]


def test_widened_codes_are_exact():
    """Identity activations read the weight back; every value of a 16-bit scale times a small integer fits."""
    for format in FORMATS[:3] + FORMATS[4:]:
        weight = random_weight(format, 32, 64, torch.float16)
        tensors = cpu.widen([weight], torch.float16)
        given = (tensors["packed"], tensors["scales"], tensors.get("zeros"))
        out = cpu.int4_linear(torch.eye(64, dtype=torch.float16), *given, None, 32, cpu.isa(torch.float16))
        assert torch.equal(out.T, weight.dequantize(torch.float16))


@pytest.mark.parametrize(
    "formats",
    [(W4, W3, W2), (W4, WeightFormat(3, 32, False), W2), (W8, W4, W8), (W4, None, W2), (None, None, W3)],
    ids=["widths", "groups and grids", "8 bits beside 4", "k at 16 bits", "v alone"],
)
def test_shards_of_different_formats(formats):
    weights = qkv_weights(formats)
    layer = qkv_layer(config_of(weights))
    dense = load_qkv(layer, weights)
    check(finish(layer), dense)


def test_merged_layer_takes_numbered_shards():
    weights = {"gate_proj": random_weight(W3, 96, 128), "up_proj": random_weight(W2, 96, 128)}
    layer = vllm_linear.MergedColumnParallelLinear(
        128, [96, 96], bias=False, params_dtype=torch.bfloat16, quant_config=config_of(weights), prefix="gate_up_proj"
    )
    for shard, weight in enumerate(weights.values()):
        load(layer, weight, shard)
    check(finish(layer), torch.cat([weight.dequantize() for weight in weights.values()]))


def test_dummy_weights_are_finite(vllm_config):
    vllm_config.load_config.load_format = "dummy"
    layer = qkv_layer(config_of(qkv_weights()))
    finish(layer)
    assert layer.quant_method.apply(layer, torch.randn(3, 128, dtype=torch.bfloat16)).isfinite().all()


def test_quantised_router():
    """vLLM 0.26 builds a ReplicatedLinear in its place."""
    if "quant_config" not in inspect.signature(GateLinear).parameters:
        pytest.skip("this vLLM's GateLinear is never quantised")
    weight = random_weight(W4, 8, 128)
    gate = GateLinear(128, 8, params_dtype=torch.bfloat16, quant_config=config_of({"gate": weight}), prefix="gate")
    gate.set_out_dtype(torch.float32)
    load(gate, weight)
    check(finish(gate), weight.dequantize())
    x = torch.randn(7, 128, dtype=torch.bfloat16)
    logits, _ = gate(x)
    assert torch.equal(logits, gate.quant_method.apply(gate, x).float())
