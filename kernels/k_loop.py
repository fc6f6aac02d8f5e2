"""The loop over K that the fused kernels share: computes one tile of out^T [BN, BM] = W [BN, K] x^T.

The product is transposed so that the weights are the left operand of the tensor core instruction, which may come from
registers, and as few as 8 tokens the right one. A step takes one span of the runtime layout (`layout.py`): field j of
its words is a slice of W columns, multiplied with the same slice of x, so nothing is ever shuffled between threads.
Scales multiply the float32 sums of a group, or the weight (SCALED) where tokens are many; one scale per row
(GROUP == -1) multiplies the sums at the end.
"""

import triton
import triton.language as tl

from vlmq_vllm.kernels.ptx import fields_of, planes_of
from vlmq_vllm.kernels.unpack import weights

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def group_of(i_span, stride_scales, SPAN: tl.constexpr, GROUP: tl.constexpr):
    """Where the span's first row of scales begins."""
    if GROUP < 0:
        return 0
    elif GROUP < SPAN:
        return i_span * (SPAN // GROUP) * stride_scales
    else:
        return i_span // (GROUP // SPAN) * stride_scales


@triton.constexpr_function
def groups_in(span, group):
    """Groups that a span has a scale of."""
    return span // group if 0 < group < span else 1


@triton.jit
def load_groups(p_groups, i_span, stride, SPAN: tl.constexpr, GROUP: tl.constexpr):
    """The span's rows of scales or zero points, each [BN]."""
    p_first = p_groups + group_of(i_span, stride, SPAN, GROUP)
    loaded = ()
    for i in tl.static_range(groups_in(SPAN, GROUP)):
        loaded = loaded + (tl.load(p_first + i * stride),)
    return loaded


@triton.jit
def load_words(p_words, BITS: tl.constexpr, W: tl.constexpr):
    """The words of a span: three planes, the first instead of those that a width does not have."""
    b_words0 = tl.load(p_words)
    if BITS == 3:
        return b_words0, tl.load(p_words + W * 64), tl.load(p_words + 2 * W * 64)
    else:
        return b_words0, b_words0, b_words0


@triton.jit
def add_span(
    b_acc,  # [BN, BM] float32
    i_span,
    p_words,  # [BN, W]: the first words of the tile's first span
    p_x,  # [W, BM]: the first slice
    m_x,  # [1, BM]
    scales,  # of the span's groups, [BN] each
    zeros,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,  # the span may reach beyond K
    PTX: tl.constexpr,
):
    """b_acc plus one span's product."""
    BN: tl.constexpr = p_words.shape[0]
    W: tl.constexpr = p_words.shape[1]
    BM: tl.constexpr = p_x.shape[1]
    FIELDS: tl.constexpr = fields_of(BITS)
    SPAN: tl.constexpr = FIELDS * W
    STEPS: tl.constexpr = groups_in(SPAN, GROUP)
    BESIDE: tl.constexpr = GROUP > 0 and not SCALED  # sums of a group of their own
    # For few tokens a zero point meets the sum of x instead of every weight: sum (u - z) x = sum (u - middle) x +
    # (middle - z) sum x. The tensor cores, idle half the time, form the sum of x (in instructions per weight at 2 bits
    # 2.0 against 2.4, counted for sm_90; with wgmma, for more tokens, it would be 3.4 against 2.6).
    LATER: tl.constexpr = HAS_ZERO and BESIDE and BM == 8
    HERE: tl.constexpr = HAS_ZERO and not LATER
    # The interpreter multiplies bit patterns of bfloat16.
    ELEMENT: tl.constexpr = tl.float32 if INTERPRETED else p_x.dtype.element_ty
    p_x += i_span * SPAN
    n_left = K - i_span * SPAN
    o_w = tl.arange(0, W)[:, None]
    words = load_words(p_words + i_span * (planes_of(BITS) * W * 64), BITS, W)
    for step in tl.static_range(STEPS):
        b_scale = scales[step]
        b_zero = zeros[step]
        b_sum = tl.zeros((BN, BM), dtype=tl.float32) if BESIDE else b_acc
        b_total = tl.zeros((BN, BM), dtype=tl.float32)
        for field in tl.static_range(step * (FIELDS // STEPS), (step + 1) * (FIELDS // STEPS)):
            m_slice = m_x & (o_w < n_left - field * W) if RAGGED else m_x
            b_x = tl.load(p_x + field * W, mask=m_slice, other=0.0).to(ELEMENT)
            b_weights = weights(words[0], words[1], words[2], b_zero, b_scale, field, BITS, ELEMENT, HERE, SCALED, PTX)
            b_sum = tl.dot(b_weights, b_x, b_sum)
            if LATER:
                b_total = tl.dot(tl.full((BN, W), 1.0, dtype=ELEMENT), b_x, b_total)
        if LATER:
            b_sum += b_total * ((1 << (BITS - 1)) - b_zero.to(tl.float32))[:, None]
        if BESIDE:
            b_acc += b_sum * b_scale.to(tl.float32)[:, None]
        else:
            b_acc = b_sum
    return b_acc


@triton.jit
def accumulate(
    words,  # [n_stripes, n_spans, P * W, 64] int16
    scales,  # [groups, n_stripes * 64]
    zeros,  # the same, uint8, read if HAS_ZERO
    p_x,  # [BM]: rows of x
    m_x,  # [BM]
    i_n,  # the rows of the weight from BN * i_n on
    i_start,  # first span
    i_stop,
    n_stripes,
    n_spans,
    K,
    BITS: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,  # K is no multiple of the span
    BN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sums [BN, BM] of the spans i_start to i_stop, scaled."""
    BM: tl.constexpr = p_x.shape[0]
    o_n = tl.arange(0, BN)
    o_w = tl.arange(0, W)
    # A tile of 128 rows and more may reach beyond the last stripe: it reads that one again, and stores it once.
    o_stripe = tl.minimum(i_n * (BN // 64) + o_n // 64, n_stripes - 1)
    stride_stripe = n_spans * (planes_of(BITS) * W * 64)
    p_words = words + (o_stripe.to(tl.int64) * stride_stripe + o_n % 64)[:, None] + o_w[None, :] * 64
    p_x = p_x[None, :] + o_w[:, None]
    m_x = m_x[None, :]
    o_row = o_stripe * 64 + o_n % 64
    p_scales = scales + o_row
    p_zeros = zeros + o_row if HAS_ZERO else p_scales
    stride = n_stripes * 64
    SPAN: tl.constexpr = fields_of(BITS) * W
    b_acc = tl.zeros((BN, BM), dtype=tl.float32)
    # Scales are loaded a span ahead: where they are needed, between two products, a load would be waited for. Not where
    # they multiply weights: steps are long there, and the code gets worse (4 bits with zero points: 4.6 for 3.4).
    AHEAD: tl.constexpr = 0 if SCALED else 1
    b_scales = load_groups(p_scales, i_start, stride, SPAN, GROUP)
    b_zeros = load_groups(p_zeros, i_start, stride, SPAN, GROUP)
    n_whole = tl.minimum(i_stop, n_spans - 1) if RAGGED else i_stop
    for i_span in range(i_start, n_whole):
        i_load = tl.minimum(i_span + AHEAD, n_spans - 1)
        b_loaded_scales = load_groups(p_scales, i_load, stride, SPAN, GROUP)
        b_loaded_zeros = load_groups(p_zeros, i_load, stride, SPAN, GROUP) if HAS_ZERO else b_loaded_scales
        if not AHEAD:
            b_scales = b_loaded_scales
            b_zeros = b_loaded_zeros
        b_acc = add_span(
            b_acc, i_span, p_words, p_x, m_x, b_scales, b_zeros, K, BITS, GROUP, HAS_ZERO, SCALED, False, PTX
        )
        b_scales = b_loaded_scales
        b_zeros = b_loaded_zeros
    if RAGGED and n_whole >= i_start and n_whole < i_stop:  # masks cost every span, so only the last has them
        b_scales = load_groups(p_scales, n_whole, stride, SPAN, GROUP)
        b_zeros = load_groups(p_zeros, n_whole, stride, SPAN, GROUP)
        b_acc = add_span(
            b_acc, n_whole, p_words, p_x, m_x, b_scales, b_zeros, K, BITS, GROUP, HAS_ZERO, SCALED, True, PTX
        )
    if GROUP < 0:
        b_acc *= tl.load(p_scales).to(tl.float32)[:, None]
    return b_acc
