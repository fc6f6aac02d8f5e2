"""The plain-torch twin of the kernels: the oracle of their tests and what runs on a CPU.

It reads the runtime layout (`layout.py`), widens the whole weight to float32 in every call and leaves speed to
`gemm.py`. Any device, float32 sums, no Triton.
"""

import torch

from vlmq_vllm.format import dequantize as dequantize_codes
from vlmq_vllm.format import unpack
from vlmq_vllm.kernels.layout import RuntimeWeight


def dequantize(weight: RuntimeWeight) -> torch.Tensor:
    """The weight [N, K] in float32."""
    codes = unpack(weight.packed.T, weight.bits, weight.columns)
    zero = None if weight.zeros is None else weight.zeros.T
    return dequantize_codes(weight.format, codes, weight.scales.T, zero)


def gemm(x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias: [..., N] in x's dtype from x [..., K] and bias [N]; summed in float32, rounded once."""
    weight.check_input(x, bias)
    out = x.float() @ dequantize(weight).T
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
