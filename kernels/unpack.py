"""Unpacks codes minus zero point to floats, one field of the runtime layout's words at a time; Triton functions.

A field (`layout.py`) holds codes of `bits` bits at the same place of every 16-bit word. Two ways give the same numbers,
exactly, for every word: PTX, two words at once (`ptx.py`), and for AMD and the interpreter, which has no inline
assembly, integers: shift, mask, subtract, convert.
"""

import triton
import triton.language as tl

from vlmq_vllm.kernels.ptx import addend_of, constraints_of, place_of, plane_of, text_of


@triton.jit
def in_register(b_value, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """A 16-bit float per row in a register for every word of the row: [BLOCK_N, BLOCK_W] from [BLOCK_N].

    As 32 bits it is what the row's threads hold anyway; a broadcast of 16-bit values would be packed for every word.
    """
    b_bits = b_value.to(tl.uint16, bitcast=True).to(tl.uint32)
    return tl.broadcast_to(b_bits[:, None], (BLOCK_N, BLOCK_W))


@triton.jit
def weights_by_ptx(
    b_words0,
    b_words1,
    b_words2,
    b_zero,
    b_scale,
    field: tl.constexpr,
    BITS: tl.constexpr,
    ELEMENT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr,
):
    """`weights` by PTX."""
    BLOCK_N: tl.constexpr = b_words0.shape[0]
    BLOCK_W: tl.constexpr = b_words0.shape[1]
    BF16: tl.constexpr = tl.bfloat16 == ELEMENT
    PLANE: tl.constexpr = plane_of(BITS, field)
    ZERO: tl.constexpr = None if HAS_ZERO else 1 << (BITS - 1)
    text: tl.constexpr = text_of(BITS, field, BF16, ZERO, SCALED)
    registers: tl.constexpr = constraints_of(BITS, field, ZERO, SCALED)
    if PLANE < 0:
        inputs = (b_words0, b_words1, b_words2)
    elif PLANE == 0:
        inputs = (b_words0,)
    elif PLANE == 1:
        inputs = (b_words1,)
    else:
        inputs = (b_words2,)
    if HAS_ZERO:
        b_constant = -(b_zero.to(tl.float32) + addend_of(BITS, field, BF16))
        inputs = inputs + (in_register(b_constant.to(ELEMENT), BLOCK_N, BLOCK_W),)
    if SCALED:
        inputs = inputs + (in_register(b_scale.to(ELEMENT), BLOCK_N, BLOCK_W),)
    if BF16:  # inline assembly wants a type itself, not the name of one
        return tl.inline_asm_elementwise(text, registers, inputs, tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(text, registers, inputs, tl.float16, True, 2)


@triton.jit
def codes(b_words0, b_words1, b_words2, field: tl.constexpr, BITS: tl.constexpr):
    """Codes of a field as integers, by shift and mask; an arithmetic shift drags in signs, which the mask cuts off."""
    PLANE: tl.constexpr = plane_of(BITS, field)
    PLACE: tl.constexpr = place_of(BITS, field)
    MASK: tl.constexpr = (1 << BITS) - 1
    if PLANE < 0:
        return ((b_words0 >> 15) & 1) | ((b_words1 >> 14) & 2) | ((b_words2 >> 13) & 4)
    elif PLANE == 0:
        return (b_words0 >> PLACE) & MASK
    elif PLANE == 1:
        return (b_words1 >> PLACE) & MASK
    else:
        return (b_words2 >> PLACE) & MASK


@triton.jit
def weights(
    b_words0,
    b_words1,
    b_words2,
    b_zero,
    b_scale,
    field: tl.constexpr,
    BITS: tl.constexpr,
    ELEMENT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
):
    """code - zero of one field, times scale if SCALED: [BN, W] of type ELEMENT.

    b_words0 to 2 are [BN, W] int16 (1 and 2 only read at 3 bits), b_zero and b_scale [BN].
    """
    if PTX:
        return weights_by_ptx(b_words0, b_words1, b_words2, b_zero, b_scale, field, BITS, ELEMENT, HAS_ZERO, SCALED)
    b_codes = codes(b_words0, b_words1, b_words2, field, BITS)
    if HAS_ZERO:
        b_codes -= b_zero.to(tl.int16)[:, None]
    else:
        b_codes -= 1 << (BITS - 1)
    if SCALED:
        return (b_codes.to(tl.float32) * b_scale.to(tl.float32)[:, None]).to(ELEMENT)
    return b_codes.to(ELEMENT)
