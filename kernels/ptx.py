"""Writes the PTX that unpacks a field of two words to two floats.

Two 16-bit words lie in a register. One LOP3 masks the field and sets the exponent above it (Kim et al. 2022, arXiv
2211.10017): with base 2^7 (bfloat16) or 2^10 (float16), a code q at mantissa bit o reads as base + q 2^o, and
fma(t, 2^-o, -(base 2^-o + zero)) is q - zero without rounding. A field beyond the mantissa is shifted down first;
fields of one shift share it. Every constant is exact: base 2^-o + zero needs at most 8 bits. 8-bit codes do not fit
into bfloat16's 7 mantissa bits and are put together from two parts. fma.rn.bf16x2 exists from sm_80 on, add and mul
only from sm_90, so both are written as fma.

Plain functions for the compiler's constants (`triton.constexpr_function`); tests evaluate the texts for all words.
"""

import triton


@triton.constexpr_function
def fields_of(bits):
    """Codes of a set of words, `layout.FIELDS`."""
    return 16 if bits == 3 else 16 // bits


@triton.constexpr_function
def planes_of(bits):
    """Words of a set, `layout.PLANES`."""
    return 3 if bits == 3 else 1


@triton.constexpr_function
def plane_of(bits, field):
    """Which word of the set holds the field; -1 for the one made of the top bits of all three."""
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
def half(value, bf16):
    """Bit pattern of a small dyadic number in bfloat16 or float16; exact or an assertion."""
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    sign = 1 if value < 0 or str(value) == "-0.0" else 0
    value = -value if value < 0 else value
    if not value:
        return sign << 15
    exponent = 0
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    fraction = (value - 1) * (1 << mantissa)
    assert fraction == int(fraction), "the constant does not fit into the mantissa"
    return (sign << 15) + ((exponent + bias) << mantissa) + int(fraction)


@triton.constexpr_function
def twice(bits):
    """A 16-bit pattern twice in 32 bits."""
    return f"0x{bits:04X}{bits:04X}"


@triton.constexpr_function
def read_field(bits, field, bf16):
    """PTX that leaves the field in t, as base + q 2^o, or for 8 bits in bfloat16 as q."""
    base = twice(half(128 if bf16 else 1024, bf16))
    if plane_of(bits, field) < 0:
        text = f"shr.u32 t, $1, 15; lop3.b32 t, t, 0x00010001, {base}, 0xEA; "
        text += "shr.u32 u, $2, 14; lop3.b32 t, u, 0x00020002, t, 0xEA; "
        return text + "shr.u32 u, $3, 13; lop3.b32 t, u, 0x00040004, t, 0xEA; "
    if bits == 8 and bf16:
        # The low seven bits read as 128 + low, the top one as 128 + h, of which 128 h - 128 is made.
        text = f"shr.u32 t, $1, {8 * field}; lop3.b32 t, t, 0x007F007F, {base}, 0xEA; "
        text += f"shr.u32 u, $1, {8 * field + 7}; lop3.b32 u, u, 0x00010001, {base}, 0xEA; "
        text += f"mov.b32 o, {twice(half(128, bf16))}; mov.b32 c, {twice(half(-16512, bf16))}; "
        text += f"fma.rn.bf16x2 u, u, o, c; mov.b32 o, {twice(half(1, bf16))}; "
        return text + "fma.rn.bf16x2 t, t, o, u; "
    offset = offset_of(bits, field, bf16)
    shift = place_of(bits, field) - offset
    text = f"shr.u32 t, $1, {shift}; " if shift else "mov.b32 t, $1; "
    return text + f"lop3.b32 t, t, {twice(((1 << bits) - 1) << offset)}, {base}, 0xEA; "


@triton.constexpr_function
def text_of(bits, field, bf16, zero, scaled):
    """PTX for two words: $0 = codes - zero, times the scale if `scaled`.

    Inputs are the word (all three for the field of top bits), then, if `zero` is None, -(addend + zero) of either word,
    each in the low half of a register of its own, and the scales likewise if `scaled`: the two words may belong to one
    row of the weight or to two.
    """
    kind = "bf16x2" if bf16 else "f16x2"
    last = 2 if plane_of(bits, field) >= 0 else 4
    text = "{.reg .b32 t, u, o, c; " + read_field(bits, field, bf16)
    if zero is None:
        text += f"prmt.b32 c, ${last}, ${last + 1}, 0x5410; "
        last += 2
    else:
        text += f"mov.b32 c, {twice(half(-(addend_of(bits, field, bf16) + zero), bf16))}; "
    text += f"mov.b32 o, {twice(half(1 / (1 << offset_of(bits, field, bf16)), bf16))}; "
    if not scaled:
        return text + f"fma.rn.{kind} $0, t, o, c;}}"
    text += f"fma.rn.{kind} t, t, o, c; mov.b32 c, {twice(half(-0.0, bf16))}; "
    return text + f"prmt.b32 o, ${last}, ${last + 1}, 0x5410; fma.rn.{kind} $0, t, o, c;}}"


@triton.constexpr_function
def constraints_of(bits, field, zero, scaled):
    """Register constraints of `text_of`."""
    words = 1 if plane_of(bits, field) >= 0 else 3
    return "=r" + ",r" * (words + (2 if zero is None else 0) + (2 if scaled else 0))
