"""x W^T + bias where tokens are many: the weight is widened piece by piece and multiplied by cuBLAS.

Above some hundreds of tokens a product is bound by arithmetic, and a library's kernel is worth the writing and reading
of the widened weight, all the more when a piece stays in the second-level cache between the two. Each weight is
rounded once to x's dtype, as in an unquantised model. The transpose W^T is written, as the words lie: rows of the
weight side by side.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.kernels import hardware
from vlmq_vllm.kernels.gemm import check
from vlmq_vllm.kernels.layout import FIELDS, TILE, RuntimeWeight
from vlmq_vllm.kernels.unpack import weights
from vlmq_vllm.kernels.walk import group_of

PIECE = 24 << 20  # bytes of a widened piece; an H200's second-level cache holds 50 to 60 MB


@triton.jit(do_not_specialize=["K", "i_first", "n_tiles", "n_spans"])
def dequantise_kernel(
    words,  # [n_tiles, n_spans, P * W, 64] int16
    scales,  # [groups, n_tiles * 64]
    zeros,
    out,  # [K, rows of the piece], the tiles from i_first on
    i_first,
    K,
    n_tiles,
    n_spans,
    stride_out,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PTX: tl.constexpr,
):
    SPAN: tl.constexpr = FIELDS * W
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    STEPS: tl.constexpr = SPAN // GROUP if GROUP > 0 and GROUP < SPAN else 1
    i_span = tl.program_id(0) % n_spans
    i_piece = tl.program_id(0) // n_spans
    i_tile = (i_first + i_piece).to(tl.int64)
    o_n = tl.arange(0, 64)
    o_w = tl.arange(0, W)
    p_words = words + (i_tile * n_spans + i_span) * (PLANES * W * 64) + o_w[None, :] * 64 + o_n[:, None]
    b_words0 = tl.load(p_words)  # [64, W]
    b_words1 = b_words0
    b_words2 = b_words0
    if BITS == 3:
        b_words1 = tl.load(p_words + W * 64)
        b_words2 = tl.load(p_words + 2 * W * 64)
    stride_scales = n_tiles * 64
    o_group = group_of(i_span, stride_scales, SPAN, GROUP) + i_tile * 64 + o_n
    p_out = out + (i_span * SPAN + o_w).to(tl.int64)[None, :] * stride_out + (i_piece * 64 + o_n)[:, None]
    for step in tl.static_range(STEPS):
        b_scale = tl.load(scales + o_group + step * stride_scales)
        b_zero = 0
        if HAS_ZERO:
            b_zero = tl.load(zeros + o_group + step * stride_scales)
        for field in tl.static_range(step * (FIELDS // STEPS), (step + 1) * (FIELDS // STEPS)):
            # Codes minus zero points are exact; the product with the scale is rounded once, from float32.
            b_codes = weights(
                b_words0, b_words1, b_words2, b_zero, b_scale, field, BITS, tl.float16, HAS_ZERO, False, PTX
            )
            b_weights = b_codes.to(tl.float32) * b_scale.to(tl.float32)[:, None]
            m_k = i_span * SPAN + field * W + o_w < K
            b_weights = b_weights.to(out.dtype.element_ty)
            tl.store(p_out + field * W * stride_out.to(tl.int64), b_weights, mask=m_k[None, :])


def dequantise(weight: RuntimeWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """W^T in `dtype`, [K, rows] of the tiles start to stop (all by default); filled-up rows are 0."""
    geometry = weight.geometry
    stop = geometry.tiles if stop is None else stop
    out = torch.empty(geometry.columns, (stop - start) * TILE, dtype=dtype, device=weight.packed.device)
    with torch.cuda.device_of(out):
        programs = (stop - start) * geometry.spans
        dequantise_kernel[(programs,)](**arguments(weight, out, start, hardware.of(out.device)))
    return out


def arguments(weight: RuntimeWeight, out: torch.Tensor, start: int, machine: hardware.Hardware) -> dict:
    """What the kernel is called with."""
    geometry = weight.geometry
    return dict(
        words=weight.packed,
        scales=weight.scales,
        zeros=weight.zeros,
        out=out,
        i_first=start,
        K=geometry.columns,
        n_tiles=geometry.tiles,
        n_spans=geometry.spans,
        stride_out=out.stride(0),
        BITS=geometry.bits,
        FIELDS=FIELDS[geometry.bits],
        W=geometry.slice,
        GROUP=geometry.group,
        HAS_ZERO=weight.zeros is not None,
        PTX=machine.ptx,
        num_warps=4,
    )


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
    step = max(1, piece // (geometry.columns * TILE * x.element_size()))
    for tile in range(0, geometry.tiles, step):
        widened = dequantise(weight, x.dtype, tile, min(tile + step, geometry.tiles))
        start, stop = tile * TILE, min((tile + step) * TILE, geometry.rows)
        widened, target = widened[:, : stop - start], out[:, start:stop]
        if bias is None:
            torch.mm(x, widened, out=target)
        else:
            torch.addmm(bias[start:stop], x, widened, out=target)
    return out
