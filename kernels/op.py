"""The torch operator vlmq::gemm_v1, through which the plugin and torch.compile reach the kernels.

    gemm_v1(x [..., columns], packed, scales, zeros | None, bias [N] | None, bits, group_size, columns) -> [..., N]

The tensors of the weight are those of `layout.RuntimeWeight`. CUDA and ROCm tensors go to the Triton kernel, which is
imported at the first call; CPU tensors go to the plain-torch twin. The name carries a version because compiled graphs
are cached by it: a change of layout or arguments is a new operator.
"""

import torch

from vlmq_vllm.kernels import reference
from vlmq_vllm.kernels.layout import RuntimeWeight

# The types of the three functions below, which torch holds them to.
SCHEMA = (
    "gemm_v1(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int columns) -> Tensor"
)


def on_gpu(x, packed, scales, zeros, bias, bits, group_size, columns):
    """The Triton kernel, for x of any leading dimensions and strides."""
    from vlmq_vllm.kernels.gemm import gemm

    weight = RuntimeWeight(packed, scales, zeros, bits, group_size, columns)
    weight.check_input(x, bias)
    tokens = x.reshape(-1, columns)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return gemm(tokens, weight, bias).view(*x.shape[:-1], weight.rows)


def on_cpu(x, packed, scales, zeros, bias, bits, group_size, columns):
    """The twin."""
    return reference.gemm(x, RuntimeWeight(packed, scales, zeros, bits, group_size, columns), bias)


def fake(x, packed, scales, zeros, bias, bits, group_size, columns):
    """Shape and dtype of the result, for tracing."""
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


def _define() -> torch.library.Library:
    library = torch.library.Library("vlmq", "FRAGMENT")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("gemm_v1", on_gpu, "CUDA")
    library.impl("gemm_v1", on_cpu, "CPU")
    torch.library.register_fake("vlmq::gemm_v1", fake, lib=library)
    return library


# The operator lives as long as this object. A second import, by another name or a reload, finds it and leaves it alone.
if not hasattr(torch.ops.vlmq, "gemm_v1"):
    _LIBRARY = _define()
