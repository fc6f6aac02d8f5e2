"""Real vLLM layers with random quantised weights, for tests: built, loaded and checked as vLLM does it."""

import torch
from vllm.model_executor.layers import linear as vllm_linear

from vlmq_vllm.checkpoint import ModuleInfo, QuantizationSpec
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.serving.config import VLMQConfig

W4, W3, W2, W8 = (WeightFormat(bits, 64, True) for bits in (4, 3, 2, 8))
FORMATS = [W4, W3, W2, W8, WeightFormat(4, 32, False), WeightFormat(3, 32, False), WeightFormat(2, -1, False)]
# A product of K = 256 terms in bfloat16 (8 bits): weights, sums of blocks and the result are rounded, each by up to
# 2^-9 relative; measured 2e-3. float16 has three bits more.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def random_weight(format: WeightFormat, rows: int, columns: int, dtype=torch.bfloat16) -> QuantizedWeight:
    shape = (rows, format.groups(columns))
    codes = torch.randint(0, format.levels, (rows, columns), dtype=torch.uint8)
    zero = None if format.symmetric else torch.randint(0, format.levels, shape, dtype=torch.uint8)
    return QuantizedWeight(format, codes, (torch.rand(shape) * 0.02 + 0.01).to(dtype), zero)


def config_of(weights: dict[str, QuantizedWeight]) -> VLMQConfig:
    config = VLMQConfig(QuantizationSpec(W4, {}))
    config.modules = {name: ModuleInfo(weight.format, *weight.codes.shape) for name, weight in weights.items()}
    config.biased = set(config.modules)
    return config


def load(layer, weight: QuantizedWeight, shard=None) -> None:
    for part, tensor in weight.tensors().items():
        load_part(layer, part, tensor, shard)


def load_part(layer, part: str, tensor: torch.Tensor, shard=None) -> None:
    param = getattr(layer, part)
    param.weight_loader(param, tensor, *(() if shard is None else (shard,)))


def finish(layer):
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def check(layer, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype=torch.bfloat16) -> None:
    """The layer's product with random inputs against float64, for inputs of two and three dimensions."""
    for leading in ((1,), (7,), (5, 1)):
        x = torch.randn(*leading, weight.shape[1], dtype=dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        out = layer.quant_method.apply(layer, x, bias)
        assert out.shape == expected.shape and out.dtype == dtype
        assert relative_error(out, expected) < TOLERANCE[dtype]


def column_layer(weight: QuantizedWeight, dtype=torch.bfloat16, **kwargs):
    rows, columns = weight.codes.shape
    layer = vllm_linear.ColumnParallelLinear(
        columns, rows, params_dtype=dtype, quant_config=config_of({"fc": weight}), prefix="fc", **kwargs
    )
    if layer.bias is not None:
        layer.bias.data.zero_()  # as loaded; vLLM leaves it as the memory was
    return layer


def qkv_layer(config: VLMQConfig, heads=4, kv_heads=2, columns=128):
    return vllm_linear.QKVParallelLinear(
        columns, 32, heads, kv_heads, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="qkv_proj"
    )


def qkv_weights(formats=(W4, FORMATS[5], W2), rows=(128, 64, 64), columns=128):
    names = ("q_proj", "k_proj", "v_proj")
    return {
        name: random_weight(format, n, columns) for name, format, n in zip(names, formats, rows, strict=True) if format
    }


def row_layer(weight: QuantizedWeight):
    return row_layer_of(config_of({"fc": weight}), weight)


def row_layer_of(quantisation: VLMQConfig, weight: QuantizedWeight):
    rows, columns = weight.codes.shape
    return vllm_linear.RowParallelLinear(
        columns, rows, bias=False, params_dtype=torch.bfloat16, quant_config=quantisation, prefix="fc"
    )


def load_qkv(layer, weights: dict[str, QuantizedWeight]) -> torch.Tensor:
    """Load q, k and v, random at 16 bits where `weights` has none, and return them below each other in float32."""
    dense = []
    for shard, rows in zip("qkv", (128, 64, 64), strict=True):
        weight = weights.get(f"{shard}_proj")
        if weight is None:
            dense.append(torch.randn(rows, 128, dtype=torch.bfloat16))
            load_part(layer, "weight", dense[-1], shard)
        else:
            load(layer, weight, shard)
            dense.append(weight.dequantize())
    return torch.cat([part.float() for part in dense])
