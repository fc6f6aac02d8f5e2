"""Multiplies many tokens of 8-bit activations by int8 tensor cores: s (q W^T) + bias.

Activations q and the codes of the weight are bytes. With q [M, K] integers in [-127, 127], s [M] a float32 for every
token, and W = scale * (u - zero) in codes u of b bits:

    out[m, n] = s[m] * sum over groups scale[g, n] * D[m, n, g] + bias[n]
    D[m, n, g] = sum over k in g of q[m, k] * c[n, k] + (2^(b-1) - zero[g, n]) * sum over k in g of q[m, k]

where c = u - 2^(b-1) fits into a signed byte. D is an exact int32; it begins as the second term, so that the first is
added by the tensor cores. Between groups (or after STEP columns of one) sums go on in float32; one scale per row
multiplies one int32 for all of K, unless K is so wide that it could overflow.

Codes c are written as bytes piece by piece, as in `dequantize.py`, so no second copy of the weights is kept; but row by
row, [rows, K filled up to whole spans], for such instructions want neighbours along K side by side.
"""

import math

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from vlmq_vllm.kernels import hardware
from vlmq_vllm.kernels.dequantize import PIECE, stripes_at_once
from vlmq_vllm.kernels.gemm import check
from vlmq_vllm.kernels.k_loop import load_words
from vlmq_vllm.kernels.layout import STRIPE, Geometry, RuntimeWeight, aligned, check_tensor
from vlmq_vllm.kernels.ptx import fields_of, planes_of
from vlmq_vllm.kernels.unpack import codes

TILE = 128  # tokens of a program, and columns of a step at most
LARGEST = 127


@triton.jit(do_not_specialize=["i_first", "n_spans"])
def centre_kernel(
    words,  # [n_stripes, n_spans, P * W, 64] int16
    out,  # [rows of the piece, n_spans * span] int8, the stripes from i_first on
    i_first,
    n_spans,
    BITS: tl.constexpr,
    W: tl.constexpr,
):
    FIELDS: tl.constexpr = fields_of(BITS)
    SPAN: tl.constexpr = FIELDS * W
    i_span = tl.program_id(0) % n_spans
    i_piece = tl.program_id(0) // n_spans
    o_n = tl.arange(0, 64)
    o_w = tl.arange(0, W)
    i_block = (i_first + i_piece).to(tl.int64) * n_spans + i_span
    p_words = words + i_block * (planes_of(BITS) * W * 64) + o_w[None, :] * 64 + o_n[:, None]
    b_words = load_words(p_words, BITS, W)  # [64, W] each
    p_out = out + (i_piece * 64 + o_n).to(tl.int64)[:, None] * (n_spans * SPAN) + (i_span * SPAN + o_w)[None, :]
    for field in tl.static_range(FIELDS):
        b_codes = codes(b_words[0], b_words[1], b_words[2], field, BITS) - (1 << (BITS - 1))
        tl.store(p_out + field * W, b_codes.to(tl.int8))


def centre(weight: RuntimeWeight, out: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Codes less 2^(b-1) into out int8 [rows, filled_columns(geometry)], of the stripes from `start` on."""
    with torch.cuda.device_of(out):
        programs = len(out) // STRIPE * weight.geometry.spans
        centre_kernel[(programs,)](**centre_arguments(weight, out, start))
    return out


def centre_arguments(weight: RuntimeWeight, out: torch.Tensor, start: int) -> dict:
    geometry = weight.geometry
    given = dict(words=weight.packed, out=out, i_first=start, n_spans=geometry.spans)
    return given | dict(BITS=geometry.bits, W=geometry.slice, num_warps=4, **hardware.LAUNCH)


def filled_columns(geometry: Geometry) -> int:
    """K filled up to whole spans."""
    return geometry.spans * geometry.span


@triton.jit(do_not_specialize=["M", "N", "i_row", "n_steps"])
def int8_kernel(
    q,  # [M, K] int8, K filled up to whole steps with zeros
    centred,  # [N, K] int8
    sums,  # int32 [M, n_steps] of q's steps, or [M, 1] if WHOLE; read if HAS_ZERO
    scales,  # [groups, stride_scales], the piece's rows from i_row on
    zeros,  # the same, uint8, read if HAS_ZERO
    token_scales,  # float32 [M]
    bias,  # [N], or None
    out,  # [M, N], rows `stride_out` apart
    M,
    N,
    K,
    i_row,
    n_steps,
    stride_scales,
    stride_out,
    MIDDLE: tl.constexpr,
    STEPS: tl.constexpr,  # of a group, 0 where a row has one
    WHOLE: tl.constexpr,  # one int32 for all of K
    HAS_ZERO: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n_m = tl.cdiv(M, BM)
    o_m = tl.program_id(0) % n_m * BM + tl.arange(0, BM)
    o_n = tl.program_id(0) // n_m * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    i_m, i_n = o_m % M, o_n % N  # what lies beyond is computed twice and not stored
    p_q = q + i_m.to(tl.int64)[:, None] * K + o_k[None, :]
    p_c = centred + i_n.to(tl.int64)[:, None] * K + o_k[None, :]
    p_scale = scales + i_row + i_n
    p_zero = zeros + i_row + i_n if HAS_ZERO else scales
    p_sum = sums + i_m.to(tl.int64) * (1 if WHOLE else n_steps) if HAS_ZERO else scales
    b_start = tl.zeros((BM, BN), dtype=tl.int32)
    if WHOLE:
        if HAS_ZERO:
            b_start += tl.load(p_sum)[:, None] * (MIDDLE - tl.load(p_zero).to(tl.int32))[None, :]
        for i in range(n_steps):
            b_q, b_c = tl.load(p_q + i * BK), tl.load(p_c + i * BK)
            b_start = tl.dot(b_q, tl.trans(b_c), b_start, out_dtype=tl.int32)
        b_acc = b_start.to(tl.float32) * tl.load(p_scale).to(tl.float32)[None, :]
    else:
        b_acc = tl.zeros((BM, BN), dtype=tl.float32)
        for i in range(n_steps):
            i_group = (i // STEPS if STEPS > 0 else 0) * stride_scales
            b_dot = b_start
            if HAS_ZERO:
                b_shift = MIDDLE - tl.load(p_zero + i_group).to(tl.int32)
                b_dot += tl.load(p_sum + i)[:, None] * b_shift[None, :]
            b_q, b_c = tl.load(p_q + i * BK), tl.load(p_c + i * BK)
            b_dot = tl.dot(b_q, tl.trans(b_c), b_dot, out_dtype=tl.int32)
            b_acc += b_dot.to(tl.float32) * tl.load(p_scale + i_group).to(tl.float32)[None, :]
    b_acc *= tl.load(token_scales + i_m)[:, None]
    if bias is not None:
        b_acc += tl.load(bias + i_n).to(tl.float32)[None, :]
    p_out = out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


def gemm(
    q: torch.Tensor,
    token_scales: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    piece: int = PIECE,
) -> torch.Tensor:
    """s (q W^T) + bias: [M, N] in q's dtype, or into `out` [M, N] of any float dtype.

    q [M, K] float16 or bfloat16 holds integers in [-127, 127], token_scales is float32 [M].
    """
    out = check(q, weight, bias, out)
    check_tensor("token_scales", token_scales, (len(q),), (torch.float32,), q)
    if out.numel() == 0:
        return out
    geometry, machine = weight.geometry, hardware.of(q.device)
    q = pad(q.to(torch.int8), (0, filled_columns(geometry) - geometry.columns))
    sums = None if weight.zeros is None else step_sums(q, geometry)
    stripes = stripes_at_once(len(q), weight, machine, 2 * piece)  # which counts two bytes for a weight
    buffer = torch.empty(stripes * STRIPE, q.shape[1], dtype=torch.int8, device=q.device)
    with torch.cuda.device_of(q):
        for first in range(0, geometry.stripes, stripes):
            start, stop = first * STRIPE, min((first + stripes) * STRIPE, geometry.rows)
            part = centre(weight, buffer[: -(-(stop - start) // STRIPE) * STRIPE], first)[: stop - start]
            programs = triton.cdiv(len(q), TILE) * triton.cdiv(len(part), rows_of(geometry))
            some = None if bias is None else bias[start:stop]
            given = arguments(q, sums, token_scales, weight, part, start, some, out[:, start:stop], machine)
            int8_kernel[(programs,)](**given)
    return out


def step_of(geometry: Geometry) -> int:
    """Columns of a step: all of one group."""
    return math.gcd(TILE, geometry.span, max(geometry.group, 0))


def rows_of(geometry: Geometry) -> int:
    """Rows of a program: half as many where a group's sums need registers beside those of all groups."""
    return TILE if is_whole(geometry) else TILE // 2


def is_whole(geometry: Geometry) -> bool:
    """Whether one int32 holds the sum over all of K."""
    return geometry.group == -1 and filled_columns(geometry) * LARGEST * geometry.format.levels < 1 << 31


def step_sums(q: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Sums of q [M, filled columns], int32: [M, steps], or [M, 1] where all of K is one."""
    steps = q.view(len(q), 1, -1) if is_whole(geometry) else q.unflatten(1, (-1, step_of(geometry)))
    return aligned(steps.sum(-1, dtype=torch.int32))


def arguments(
    q: torch.Tensor,
    sums: torch.Tensor | None,
    token_scales: torch.Tensor,
    weight: RuntimeWeight,
    part: torch.Tensor,
    start: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    machine: hardware.Hardware,
) -> dict:
    """What int8_kernel is called with, for rows `start` and on, whose codes are `part`."""
    geometry, step = weight.geometry, step_of(weight.geometry)
    return dict(
        q=q,
        centred=part,
        sums=sums,
        scales=weight.scales,
        zeros=weight.zeros,
        token_scales=token_scales,
        bias=bias,
        out=out,
        M=len(q),
        N=len(part),
        K=q.shape[1],
        i_row=start,
        n_steps=q.shape[1] // step,
        stride_scales=weight.scales.stride(0),
        stride_out=out.stride(0),
        MIDDLE=geometry.format.middle,
        STEPS=max(geometry.group, 0) // step,
        WHOLE=is_whole(geometry),
        HAS_ZERO=weight.zeros is not None,
        BM=TILE,
        BN=rows_of(geometry),
        BK=step,
        # Triton 3.8 gives tiles of 4 and 8 warps to Blackwell's tcgen05, whose sums then spill.
        num_warps=16 if machine.arch.startswith("sm_10") else 8,
        num_stages=3 if machine.shared >= 96 << 10 else 2,
        **hardware.LAUNCH,
    )
