"""out [M, N] = x [M, K] W^T + bias in Triton, W in the runtime layout of `layout.py`, every width from one source.

Each program owns a tile of the output and walks along K. Codes minus zero point are small integers, exact in float16
and bfloat16, and meet x on the tensor cores; the scale of the step's group multiplies the float32 sums afterwards. So
the weight itself is never rounded, and x against the identity gives scale * (code - zero) rounded once.

The choice of tiles belongs to `tiles.py`, the torch operator to `op.py`, the same product in plain torch to
`reference.py`. Runs on a CPU in Triton's interpreter when TRITON_INTERPRET=1 was set before this module's import.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.kernels.layout import DTYPES, RuntimeWeight
from vlmq_vllm.kernels.tiles import pick_tile

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_codes(p_words, n_words, stride, m_n, BITS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """Codes [BK, BN] int32 of BK columns from whole blocks on; p_words [BN] points at their first words.

    `n_words` words are left in the weight below p_words; codes beyond them are 0.
    """
    BLOCKS: tl.constexpr = BK // 32
    if BITS == 3:
        # A code may lie across two words, so it is cut from 64 bits: words 0 and 1 for codes 0-15, 1 and 2 for 16-31.
        o_word = tl.arange(0, BLOCKS)[:, None] * 3
        m_word = (o_word < n_words) & m_n[None, :]  # blocks are whole: the first word stands for all three
        p_block = p_words[None, :] + o_word.to(tl.int64) * stride
        b_word0 = tl.load(p_block, mask=m_word, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)  # [BLOCKS, BN]
        b_word1 = tl.load(p_block + stride, mask=m_word, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        b_word2 = tl.load(p_block + 2 * stride, mask=m_word, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        b_low = b_word0 | (b_word1 << 32)
        b_high = b_word1 | (b_word2 << 32)
        i_code = tl.arange(0, 32)[None, :, None]
        b_pair = tl.where(i_code < 16, b_low[:, None, :], b_high[:, None, :])  # [BLOCKS, 32, BN]
        b_shift = tl.where(i_code < 16, i_code * 3, i_code * 3 - 32)
        b_codes = (b_pair >> b_shift.to(tl.uint64)).to(tl.int32) & 7
    else:
        FIELDS: tl.constexpr = 32 // BITS
        o_word = tl.arange(0, BLOCKS * BITS)[:, None]
        m_word = (o_word < n_words) & m_n[None, :]
        b_words = tl.load(p_words[None, :] + o_word.to(tl.int64) * stride, mask=m_word, other=0)
        b_shift = tl.arange(0, FIELDS)[None, :, None] * BITS
        # An arithmetic shift drags the sign in from above; the mask cuts it off.
        b_codes = (b_words[:, None, :] >> b_shift) & ((1 << BITS) - 1)  # [BLOCKS * BITS, FIELDS, BN]
    return tl.reshape(b_codes, (BK, BN))


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,  # [M, K], rows `stride_x` apart
    packed,  # [ceil(K / 32) * BITS, N] int32
    scales,  # [G, N]
    zeros,  # [G, N] uint8, read if HAS_ZERO
    bias,  # [N], read if HAS_BIAS
    out,  # [M, N], rows `stride_out` apart
    M,
    N,
    K,
    stride_x,
    stride_out,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # -1: one group per row; else a multiple of BK
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERP: tl.constexpr,
):
    # Token tiles are neighbours in launch order: they read the same part of the weight at about the same time.
    i_tile = tl.program_id(0).to(tl.int64)
    n_m = tl.cdiv(M, BM)
    o_m = (i_tile % n_m) * BM + tl.arange(0, BM)
    o_n = (i_tile // n_m) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m = o_m < M
    m_n = o_n < N
    n_words = tl.cdiv(K, 32) * BITS
    stride_n = tl.cast(N, tl.int64)
    p_x = x + o_m[:, None] * stride_x + o_k[None, :]  # [BM, BK]
    p_words = packed + o_n  # [BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.float32)

    for i_k in range(0, K, BK):
        i_word = i_k // 32 * BITS
        b_codes = load_codes(p_words + i_word * stride_n, n_words - i_word, stride_n, m_n, BITS, BK, BN)
        b_x = tl.load(p_x + i_k, mask=m_m[:, None] & (o_k[None, :] < K - i_k), other=0.0)
        o_scale = o_n
        if GROUP > 0:
            o_scale += i_k // GROUP * stride_n
        b_scale = tl.load(scales + o_scale, mask=m_n, other=0.0).to(tl.float32)
        if HAS_ZERO:
            b_codes -= tl.load(zeros + o_scale, mask=m_n, other=0).to(tl.int32)[None, :]
        else:
            b_codes -= 1 << (BITS - 1)
        if INTERP:  # the interpreter multiplies the bit patterns of bfloat16
            b_dot = tl.dot(b_x.to(tl.float32), b_codes.to(tl.float32))
        else:
            b_dot = tl.dot(b_x, b_codes.to(b_x.dtype), input_precision="ieee")
        b_acc += b_dot * b_scale[None, :]

    if HAS_BIAS:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_out = out + o_m[:, None] * stride_out + o_n[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def gemm(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias: [M, N] in x's dtype from x [M, K] and bias [N], or into `out` [M, N] of any float dtype."""
    weight.check_input(x, bias)
    if x.ndim != 2 or (x.stride(1) != 1 and weight.columns > 1):
        raise ValueError(f"x has shape {list(x.shape)} and strides {x.stride()}; it must be [M, K] with dense rows")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"x is on {x.device}; Triton needs a GPU, or TRITON_INTERPRET=1 before the first import")
    shape = (x.shape[0], weight.rows)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif out.shape != shape or out.dtype not in DTYPES or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; it must be a contiguous float tensor "
            f"{list(shape)} on {x.device}"
        )
    if out.numel() == 0:
        return out
    tile = pick_tile(x.shape[0], weight.group_size)
    programs = triton.cdiv(shape[0], tile.tokens) * triton.cdiv(shape[1], tile.rows)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        gemm_kernel[(programs,)](
            x=x,
            packed=weight.packed,
            scales=weight.scales,
            zeros=weight.zeros,
            bias=bias,
            out=out,
            M=x.shape[0],
            N=weight.rows,
            K=weight.columns,
            stride_x=x.stride(0),
            stride_out=out.stride(0),
            BITS=weight.bits,
            GROUP=weight.group_size,
            HAS_ZERO=weight.zeros is not None,
            HAS_BIAS=bias is not None,
            BM=tile.tokens,
            BN=tile.rows,
            BK=tile.columns,
            INTERP=INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
