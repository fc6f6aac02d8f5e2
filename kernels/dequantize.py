"""Multiplies many tokens: dequantises the weight piece by piece and multiplies each piece by cuBLAS.

Above some hundreds of tokens a product is bound by arithmetic, and a library's kernel is worth the writing and reading
of the dequantised weight, the more when a piece stays in the second-level cache between the two. Each weight is rounded
once to x's dtype, as in an unquantised model. The transpose W^T is written, as the words lie.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.kernels import hardware
from vlmq_vllm.kernels.gemm import check, weight_arguments
from vlmq_vllm.kernels.k_loop import groups_in, load_groups, load_words
from vlmq_vllm.kernels.layout import STRIPE, RuntimeWeight
from vlmq_vllm.kernels.ptx import fields_of, planes_of
from vlmq_vllm.kernels.unpack import weights

PIECE = 16 << 20  # bytes of a dequantised piece, at least; an H200's second-level cache holds 50 to 60 MB
LIBRARY_TILE = 128 * 128  # of the result, about what cuBLAS gives a multiprocessor at once


@triton.jit(do_not_specialize=["K", "i_first", "n_stripes", "n_spans"])
def dequantize_kernel(
    words,  # [n_stripes, n_spans, P * W, 64] int16
    scales,  # [groups, n_stripes * 64]
    zeros,
    out,  # [K, rows of the piece], the stripes from i_first on
    i_first,
    K,
    n_stripes,
    n_spans,
    stride_out,
    BITS: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PTX: tl.constexpr,
):
    FIELDS: tl.constexpr = fields_of(BITS)
    SPAN: tl.constexpr = FIELDS * W
    STEPS: tl.constexpr = groups_in(SPAN, GROUP)
    i_span = tl.program_id(0) % n_spans
    i_piece = tl.program_id(0) // n_spans
    i_stripe = (i_first + i_piece).to(tl.int64)
    o_n = tl.arange(0, 64)
    o_w = tl.arange(0, W)
    p_words = words + (i_stripe * n_spans + i_span) * (planes_of(BITS) * W * 64) + o_w[None, :] * 64 + o_n[:, None]
    b_words = load_words(p_words, BITS, W)  # [64, W] each
    stride_scales = n_stripes * 64
    o_row = i_stripe * 64 + o_n
    b_scales = load_groups(scales + o_row, i_span, stride_scales, SPAN, GROUP)
    b_zeros = load_groups(zeros + o_row, i_span, stride_scales, SPAN, GROUP) if HAS_ZERO else b_scales
    p_out = out + (i_span * SPAN + o_w).to(tl.int64)[None, :] * stride_out + (i_piece * 64 + o_n)[:, None]
    for step in tl.static_range(STEPS):
        # Codes and zero points are exact; the product with the scale is rounded once, from float32.
        b_shift = (1 << (BITS - 1)) - b_zeros[step].to(tl.float32) if HAS_ZERO else b_scales[step].to(tl.float32) * 0
        for field in tl.static_range(step * (FIELDS // STEPS), (step + 1) * (FIELDS // STEPS)):
            b_codes = weights(b_words[0], b_words[1], b_words[2], 0, 0.0, field, BITS, tl.float16, False, False, PTX)
            b_weights = (b_codes.to(tl.float32) + b_shift[:, None]) * b_scales[step].to(tl.float32)[:, None]
            m_k = i_span * SPAN + field * W + o_w < K
            p_field = p_out + field * W * stride_out.to(tl.int64)
            tl.store(p_field, b_weights.to(out.dtype.element_ty), mask=m_k[None, :])


def dequantize(weight: RuntimeWeight, out: torch.Tensor, start: int = 0) -> torch.Tensor:
    """W^T into out [K, rows], of the stripes from `start` on, as many as out has columns for; filled-up rows are 0."""
    with torch.cuda.device_of(out):
        programs = out.shape[1] // STRIPE * weight.geometry.spans
        dequantize_kernel[(programs,)](**arguments(weight, out, start, hardware.of(out.device)))
    return out


def arguments(weight: RuntimeWeight, out: torch.Tensor, start: int, machine: hardware.Hardware) -> dict:
    return dict(out=out, i_first=start, stride_out=out.stride(0), num_warps=4, **weight_arguments(weight, machine))


def stripes_at_once(m: int, weight: RuntimeWeight, machine: hardware.Hardware, piece: int = PIECE) -> int:
    """Stripes of a piece, about equal ones: at least `piece` bytes, and so many that m tokens make work for all."""
    busy = -(-machine.multiprocessors * LIBRARY_TILE // (m * STRIPE))
    least = max(1, busy, piece // (weight.geometry.columns * STRIPE * 2))
    pieces = max(1, weight.geometry.stripes // least)
    return -(-weight.geometry.stripes // pieces)


def gemm(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    piece: int = PIECE,
) -> torch.Tensor:
    """x W^T + bias: [M, N] in x's dtype from x [M, K] and bias [N], or into `out` [M, N] of the same dtype."""
    out = check(x, weight, bias, out)
    if out.dtype != x.dtype:
        raise ValueError(f"out is {out.dtype}, x {x.dtype}; cuBLAS writes x's")
    if out.numel() == 0:
        return out
    geometry = weight.geometry
    step = stripes_at_once(len(x), weight, hardware.of(x.device), piece)
    buffer = torch.empty(geometry.columns, step * STRIPE, dtype=x.dtype, device=x.device)
    for first in range(0, geometry.stripes, step):
        stripes = min(step, geometry.stripes - first)
        start, stop = first * STRIPE, min((first + stripes) * STRIPE, geometry.rows)
        dense = dequantize(weight, buffer[:, : stripes * STRIPE], first)[:, : stop - start]
        if bias is None:
            torch.mm(x, dense, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, dense, out=out[:, start:stop])
    return out
