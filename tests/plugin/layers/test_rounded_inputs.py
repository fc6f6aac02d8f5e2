"""Layers of checkpoints with activations of 8 bits: rounded inputs times the dequantised weight in float64."""

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

from vllm_layers import (
    TOLERANCE,
    W4,
    W8,
    config_of,
    finish,
    load,
    load_qkv,
    qkv_layer,
    qkv_weights,
    random_weight,
    relative_error,
    row_layer_of,
)
from vlmq_vllm.activations import quantize_tokens
from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.serving import launch
from vlmq_vllm.serving.claims import Claims
from vlmq_vllm.serving.config import VLMQConfig

BF16, FP16 = torch.bfloat16, torch.float16
ASYMMETRIC = WeightFormat(4, 32, False)
FORMATS = [W4, W8, ASYMMETRIC, WeightFormat(4, -1, True), WeightFormat(8, 128, False)]


def rounding(weights: dict[str, QuantizedWeight]) -> VLMQConfig:
    """A configuration whose checkpoint says activation_bits 8."""
    config, plain = VLMQConfig(QuantizationSpec(W4, {}, 8)), config_of(weights)
    config.modules, config.biased = plain.modules, plain.biased
    return config


def column_layer(weight: QuantizedWeight, dtype: torch.dtype):
    rows, columns = weight.codes.shape
    layer = vllm_linear.ColumnParallelLinear(
        columns, rows, bias=False, params_dtype=dtype, quant_config=rounding({"fc": weight}), prefix="fc"
    )
    load(layer, weight)
    return finish(layer)


def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    q, scale = quantize_tokens(x)
    return scale.double() * (q.double() @ weight.double().T)


def check(layer, wanted, columns: int, dtype: torch.dtype, bias: torch.Tensor | None = None) -> None:
    """`wanted(x)` in float64 for inputs of two and three dimensions; unlike it, products of x itself are far off."""
    for leading in ((1,), (7,), (5, 1), (150,)):
        x = torch.randn(*leading, columns, dtype=dtype) * torch.rand(*leading, 1, dtype=dtype)
        expected = wanted(x) + (0 if bias is None else bias.double())
        out = layer.quant_method.apply(layer, x, bias)
        assert out.shape == expected.shape and out.dtype == dtype
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (33, 100)])
def test_every_format(format, dtype, rows, columns):
    weight = random_weight(format, rows, columns, dtype)
    layer = column_layer(weight, dtype)
    dense = weight.dequantize()
    assert layer.vlmq_launches[0].kind == ("int4" if format.bits == 4 else "dense")
    for bias in (None, torch.randn(rows, dtype=dtype)):
        check(layer, lambda x: products(x, dense), columns, dtype, bias)


def test_rounding_is_seen():
    """By the measure of the other tests: without it they would fail."""
    weight = random_weight(W4, 96, 256, FP16)
    x = torch.randn(7, 256, dtype=FP16)
    layer = column_layer(weight, FP16)
    assert relative_error(layer.quant_method.apply(layer, x), x.double() @ weight.dequantize().double().T) > 5e-3


@pytest.mark.parametrize("formats", [(W4, W8, ASYMMETRIC), (W4, None, W8), (None, W4, W4)], ids=str)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "twin of the gpu kernels"])
def test_parts_of_a_fused_layer(formats, on_gpu, monkeypatch):
    """Parts that the checkpoint keeps at 16 bits take the input as it is."""
    if on_gpu:
        monkeypatch.setattr(launch.Piece, "device", torch.device("cuda"))
    weights = qkv_weights(formats)
    layer = qkv_layer(rounding(weights))
    parts = load_qkv(layer, weights).split([128, 64, 64])
    kinds = {step.kind for step in finish(layer).vlmq_launches}
    assert ("triton" in kinds) is on_gpu

    def wanted(x):
        exact = [x.double() @ part.double().T for part in parts]
        return torch.cat(
            [products(x, part) if kept else full for part, kept, full in zip(parts, formats, exact, strict=True)], -1
        )

    check(layer, wanted, 128, BF16, torch.randn(256, dtype=BF16))


@pytest.mark.parametrize("format", [W4, W8], ids=str)
def test_products_that_float16_cannot_hold(format):
    """Of the integers, where the result can be held."""
    weight = random_weight(format, 32, 8192, FP16)
    dense = weight.dequantize()
    x = 0.01 * dense[:1].sign().to(FP16)
    q, _ = quantize_tokens(x)
    assert (q.double() @ dense.double().T).max() > torch.finfo(FP16).max
    layer = column_layer(weight, FP16)
    assert relative_error(layer.quant_method.apply(layer, x), products(x, dense)) < TOLERANCE[FP16]


def test_ranks_round_what_they_hold(ranks):
    """A row-parallel layer's rank has a part of every token, and its scale."""
    weight = random_weight(W4, 64, 256)
    x = torch.randn(5, 256, dtype=BF16) * torch.tensor([8.0] * 128 + [0.25] * 128)
    x = x.to(BF16)
    for rank, part in ((0, slice(0, 128)), (1, slice(128, 256))):
        ranks(rank, 2)
        layer = row_layer_of(rounding({"fc": weight}), weight)
        load(layer, weight)
        out = finish(layer).quant_method.apply(layer, x[:, part].contiguous())
        assert relative_error(out, products(x[:, part], weight.dequantize()[:, part])) < TOLERANCE[BF16]


def test_experts_are_refused():
    weights = {f"mlp.experts.0.{name}_proj": random_weight(W4, 64, 64) for name in ("gate", "up", "down")}
    config = rounding(weights)
    with pytest.raises(ValueError, match="^mlp.experts: experts .* inputs of 16 bits only, .* activation_bits 8"):
        config._experts_method(None, "mlp.experts")


def test_start_table_says_so():
    weights = {"fc": random_weight(W4, 64, 128)}
    for config, text in ((config_of(weights), "W4 g64"), (rounding(weights), "W4A8 g64")):
        assert isinstance(config.claims, Claims)
        config.claims.add("fc", [("fc", config.modules["fc"]), ("other", None)])
        assert f"{text} | 16" in str(config.claims)
