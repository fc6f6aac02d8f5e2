"""Defines the torch operators of the namespace vlmq, through which the plugin and torch.compile reach the kernels.

    linear_v1       x [..., K] times the weights of a layer, stacked along the rows, which may differ in bits, group and
                    grid: [..., sum of rows]; entry i of every list belongs to weight i, whose tensors are those of
                    `layout.RuntimeWeight` (zeros[i] None if symmetric)
    linear_int8_v1  token_scales [..., 1] * (q [..., K] times the weights) + bias in q's dtype, of integers q in
                    [-127, 127] (`vlmq_vllm/activations.py`)
    experts_v1      every token with the experts that it is routed to, as in `experts.multiply`

CUDA and ROCm tensors go to the Triton kernels, imported at the first call, CPU tensors to the plain-torch twin. The
names carry a version because compiled graphs are cached by them: a change of layout or arguments is a new operator.
"""

from collections.abc import Callable
from functools import cache

import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.kernels import reference
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.layout import PLANES, Geometry, RuntimeWeight

# The types of the functions below, which torch holds them to.
LINEAR = (
    "(Tensor x, Tensor[] packed, Tensor[] scales, Tensor?[] zeros, Tensor? bias, "
    "int[] bits, int[] group_sizes, int[] rows, int columns, bool batch_invariant) -> Tensor"
)
INT8 = LINEAR.replace("(Tensor x, ", "(Tensor q, Tensor token_scales, ")
EXPERTS = (
    "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor ids, Tensor? bias, Tensor? router, "
    "int bits, int group_size, int rows, int columns) -> Tensor"
)


def linear_on_gpu(x, token_scales, packed, scales, zeros, bias, bits, group_sizes, rows, columns, batch_invariant):
    """The Triton kernels and cuBLAS, for x of any leading dimensions and strides."""
    from vlmq_vllm.kernels.dispatch import multiply

    weights = _weights(packed, scales, zeros, bits, group_sizes, rows, columns)
    return multiply(x, weights, bias, batch_invariant, token_scales)


def linear_on_cpu(x, token_scales, packed, scales, zeros, bias, bits, group_sizes, rows, columns, batch_invariant):
    """The twin; a processor's products do not depend on the batch beyond what torch's own do."""
    weights = _weights(packed, scales, zeros, bits, group_sizes, rows, columns)
    parts = [None] * len(rows) if bias is None else bias.split(rows)
    outs = [reference.gemm(x, *part, token_scales) for part in zip(weights, parts, strict=True)]
    return torch.cat(outs, dim=-1)


def linear_fake(x, token_scales, packed, scales, zeros, bias, bits, group_sizes, rows, columns, batch_invariant):
    return x.new_empty((*x.shape[:-1], sum(rows)))


def without_scales(linear: Callable) -> Callable:
    """The function of linear_v1, from that of linear_int8_v1."""
    return lambda x, *given: linear(x, None, *given)


def experts_on_gpu(x, packed, scales, zeros, ids, bias, router, bits, group_size, rows, columns):
    from vlmq_vllm.kernels.experts import multiply

    return multiply(x, _experts(packed, scales, zeros, bits, group_size, rows, columns), ids, bias, router)


def experts_on_cpu(x, packed, scales, zeros, ids, bias, router, bits, group_size, rows, columns):
    weights = _experts(packed, scales, zeros, bits, group_size, rows, columns)
    return reference.experts(x, weights, ids, bias, router)


def experts_fake(x, packed, scales, zeros, ids, bias, router, bits, group_size, rows, columns):
    return x.new_empty((*ids.shape, rows))


def _weights(packed, scales, zeros, bits, group_sizes, rows, columns) -> list[RuntimeWeight]:
    weights = []
    for parts in zip(packed, scales, zeros, bits, group_sizes, rows, strict=True):
        words, scale, zero, b, group_size, count = parts
        geometry = _geometry(b, group_size, zero is None, count, columns, words.shape[-2] // PLANES[b])
        weights.append(RuntimeWeight(geometry, words, scale, zero))
    return weights


def _experts(packed, scales, zeros, bits, group_size, rows, columns) -> ExpertWeights:
    geometry = _geometry(bits, group_size, zeros is None, rows, columns, packed.shape[-2] // PLANES[bits])
    return ExpertWeights(geometry, packed, scales, zeros)


@cache
def _geometry(bits: int, group_size: int, symmetric: bool, rows: int, columns: int, slice: int) -> Geometry:
    return Geometry(WeightFormat(bits, group_size, symmetric), rows, columns, slice)


def define(name: str, schema: str, fake: Callable, **functions: Callable) -> None:
    """Define vlmq::`name` with a function by device. A second import, by another name or a reload, leaves it."""
    if not hasattr(torch.ops.vlmq, name):
        torch.library.define(f"vlmq::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"vlmq::{name}", fake)
        for device, function in functions.items():
            torch.library.impl(f"vlmq::{name}", device, function)


define(
    "linear_v1",
    LINEAR,
    without_scales(linear_fake),
    cuda=without_scales(linear_on_gpu),
    cpu=without_scales(linear_on_cpu),
)
define("linear_int8_v1", INT8, linear_fake, cuda=linear_on_gpu, cpu=linear_on_cpu)
define("experts_v1", EXPERTS, experts_fake, cuda=experts_on_gpu, cpu=experts_on_cpu)
