"""Codes minus zero point as floats, one field of the runtime layout's words at a time: device functions.

A field (`layout.py`) holds codes of `bits` bits at the same place of every 16-bit word. Two ways give the same numbers,
exactly, for every word:

    PTX      Two words lie in a register. One LOP3 masks the field and sets the exponent above it (Kim et al. 2022,
             arXiv 2211.10017): with base 2^7 (bfloat16) or 2^10 (float16), a code q at mantissa bit o reads as
             base + q 2^o, and fma(t, 2^-o, -(base 2^-o + zero)) is q - zero without rounding. A field beyond the
             mantissa is shifted down first; fields of one shift share it.
    integer  shift, mask, subtract, convert: for AMD and for the interpreter, which has no inline assembly.

Every constant is exact: base 2^-o + zero needs at most 8 bits. 8-bit codes do not fit into bfloat16's 7 mantissa bits
and are put together from two parts. fma.rn.bf16x2 exists from sm_80 on, add and mul only from sm_90, so both are
written as fma. The texts are tested by evaluating them for all words.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def half(value, bf16):
    """Bit pattern of a small dyadic number in bfloat16 or float16, twice in 32 bits; exact or an assertion."""
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    sign = 1 if value < 0 or str(value) == "-0.0" else 0
    value = -value if value < 0 else value
    exponent = 0
    if value:
        while value >= 2:
            value, exponent = value / 2, exponent + 1
        while value < 1:
            value, exponent = value * 2, exponent - 1
        fraction = (value - 1) * (1 << mantissa)
        assert fraction == int(fraction), "the constant does not fit into the mantissa"
        bits = ((exponent + bias) << mantissa) + int(fraction)
    else:
        bits = 0
    bits += sign << 15
    return f"0x{bits:04X}{bits:04X}"


@triton.constexpr_function
def twice(bits):
    """A 16-bit pattern twice in 32 bits."""
    return f"0x{bits:04X}{bits:04X}"


@triton.constexpr_function
def plane_of(bits, field):
    """Which of the words (three at 3 bits, else one) holds the field; -1 for the one made of all three's top bits."""
    if bits != 3:
        return 0
    return -1 if field == 15 else field // 5


@triton.constexpr_function
def place_of(bits, field):
    """Lowest bit of the field in its word."""
    return bits * (field % 5) if bits == 3 else bits * field


@triton.constexpr_function
def offset_of(bits, field, bf16):
    """Mantissa bit at which the field is read."""
    per_shift = (7 if bf16 else 10) // bits
    return 0 if plane_of(bits, field) < 0 or per_shift == 0 else place_of(bits, field) // bits % per_shift * bits


@triton.constexpr_function
def addend_of(bits, field, bf16):
    """What the field reads as besides code and zero point, base 2^-o; 0 where the text takes it off itself."""
    base = 128 if bf16 else 1024
    return 0 if bits == 8 and bf16 else base / (1 << offset_of(bits, field, bf16))


@triton.constexpr_function
def ptx(bits, field, bf16, zero, scaled):
    """PTX for two words: $0 = codes - zero, times the scale if `scaled`.

    Inputs are the word (all three for the field of top bits), then, if `zero` is None, a 32-bit pair of
    -(addend + zero), and the scale as such a pair if `scaled`; pairs come twice (32-bit operands of packed assembly).
    """
    kind = "bf16x2" if bf16 else "f16x2"
    base = half(128 if bf16 else 1024, bf16)
    words = 3 if plane_of(bits, field) < 0 else 1
    text = "{.reg .b32 t, u, o, c; "
    if words == 3:
        text += f"shr.u32 t, $1, 15; lop3.b32 t, t, 0x00010001, {base}, 0xEA; "
        text += "shr.u32 u, $2, 14; lop3.b32 t, u, 0x00020002, t, 0xEA; "
        text += "shr.u32 u, $3, 13; lop3.b32 t, u, 0x00040004, t, 0xEA; "
    elif bits == 8 and bf16:
        # The low seven bits are 128 + low, the top one 128 + h, of which 128 h - 128 is made.
        text += f"shr.u32 t, $1, {8 * field}; lop3.b32 t, t, 0x007F007F, {base}, 0xEA; "
        text += f"shr.u32 u, $1, {8 * field + 7}; lop3.b32 u, u, 0x00010001, {base}, 0xEA; "
        text += f"mov.b32 o, {half(128, bf16)}; mov.b32 c, {half(-16512, bf16)}; fma.rn.{kind} u, u, o, c; "
        text += f"mov.b32 o, {half(1, bf16)}; fma.rn.{kind} t, t, o, u; "
    else:
        offset = offset_of(bits, field, bf16)
        shift = place_of(bits, field) - offset
        text += f"shr.u32 t, $1, {shift}; " if shift else "mov.b32 t, $1; "
        text += f"lop3.b32 t, t, {twice(((1 << bits) - 1) << offset)}, {base}, 0xEA; "
    last = 1 + words
    if zero is None:
        constant, last = f"${last}", last + 2
    else:
        constant = "c"
        text += f"mov.b32 c, {half(-(addend_of(bits, field, bf16) + zero), bf16)}; "
    text += f"mov.b32 o, {half(1 / (1 << offset_of(bits, field, bf16)), bf16)}; "
    if not scaled:
        return text + f"fma.rn.{kind} $0, t, o, {constant};}}"
    text += f"fma.rn.{kind} t, t, o, {constant}; mov.b32 c, {half(-0.0, bf16)}; "
    return text + f"fma.rn.{kind} $0, t, ${last}, c;}}"


@triton.constexpr_function
def constraints(bits, field, zero, scaled):
    """Register constraints of `ptx`."""
    words = 3 if plane_of(bits, field) < 0 else 1
    return "=r" + ",r" * (words + (2 if zero is None else 0) + (2 if scaled else 0))


@triton.jit
def pair(b_value, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """A 16-bit float per row as a 32-bit pair of itself, for every word of the row: [BLOCK_N, BLOCK_W] from [BLOCK_N].

    Packed once per row; a broadcast of 16-bit values would be packed anew for every pair of words.
    """
    b_bits = b_value.to(tl.uint16, bitcast=True).to(tl.uint32)
    return tl.broadcast_to((b_bits | (b_bits << 16))[:, None], (BLOCK_N, BLOCK_W))


@triton.jit
def weights_ptx(
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
    text: tl.constexpr = ptx(BITS, field, BF16, ZERO, SCALED)
    registers: tl.constexpr = constraints(BITS, field, ZERO, SCALED)
    if PLANE < 0:
        words = (b_words0, b_words1, b_words2)
    elif PLANE == 0:
        words = (b_words0,)
    elif PLANE == 1:
        words = (b_words1,)
    else:
        words = (b_words2,)
    if HAS_ZERO:
        b_constant = -(b_zero.to(tl.float32) + addend_of(BITS, field, BF16))
        words = words + (pair(b_constant.to(ELEMENT), BLOCK_N, BLOCK_W),)
    if SCALED:
        words = words + (pair(b_scale.to(ELEMENT), BLOCK_N, BLOCK_W),)
    if BF16:  # inline assembly wants a type itself, not the name of one
        return tl.inline_asm_elementwise(text, registers, words, tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(text, registers, words, tl.float16, True, 2)


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
        return weights_ptx(b_words0, b_words1, b_words2, b_zero, b_scale, field, BITS, ELEMENT, HAS_ZERO, SCALED)
    b_codes = codes(b_words0, b_words1, b_words2, field, BITS)
    if HAS_ZERO:
        b_codes -= b_zero.to(tl.int16)[:, None]
    else:
        b_codes -= 1 << (BITS - 1)
    if SCALED:
        return (b_codes.to(tl.float32) * b_scale.to(tl.float32)[:, None]).to(ELEMENT)
    return b_codes.to(ELEMENT)
