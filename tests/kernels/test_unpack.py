"""Unpacking is exact: every 16-bit word, field, width and type, by PTX (evaluated) and by the integer path (run)."""

import pytest
import torch
import triton
import triton.language as tl

from kernel_problems import BF16, FP16, FP32
from ptx import run
from vlmq_vllm.format import BITS
from vlmq_vllm.kernels.hardware import of
from vlmq_vllm.kernels.layout import FIELDS, PLANES
from vlmq_vllm.kernels.ptx import addend_of, constraints_of, fields_of, half, plane_of, planes_of, text_of
from vlmq_vllm.kernels.reference import places
from vlmq_vllm.kernels.unpack import weights

NO_BF16 = "Triton's interpreter converts to bfloat16 wrongly; this needs a GPU"
CASES = [(bits, field) for bits in BITS for field in range(FIELDS[bits])]
ALL = torch.arange(1 << 16)


def words_of(bits: int, field: int) -> list[torch.Tensor]:
    """All words, int64; for the 3-bit code of top bits three words, whose top bits take all eight values."""
    if plane_of(bits, field) >= 0:
        return [ALL]
    return [ALL, ALL.roll(1 << 14), ALL.roll(5 << 13)]


def codes_of(bits: int, field: int, words: list[torch.Tensor]) -> torch.Tensor:
    """The codes by the twin's account of where they lie."""
    codes = torch.zeros_like(ALL)
    for plane, place, low, count in places(bits, field):
        word = words[plane] if len(words) > 1 else words[0]
        codes |= (word >> place & (1 << count) - 1) << low
    return codes


def paired(words: torch.Tensor) -> torch.Tensor:
    """Two different words a register: each word once below and once above."""
    return words | words.roll(12345) << 16


def half_values(register: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    return [(register >> shift & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype) for shift in (0, 16)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("bits", "field"), CASES)
def test_ptx_symmetric(bits, field, dtype):
    words, bf16, zero = words_of(bits, field), dtype == BF16, 1 << (bits - 1)
    low, high = half_values(run(text_of(bits, field, bf16, zero, False), [paired(word) for word in words]), dtype)
    expected = codes_of(bits, field, words) - zero
    assert torch.equal(low.double(), expected.double())
    assert torch.equal(high.double(), expected.roll(12345).double())


def constant(bits: int, field: int, zero: int, bf16: bool) -> torch.Tensor:
    """The register that the kernel makes of a zero point."""
    return torch.tensor(half(-(addend_of(bits, field, bf16) + zero), bf16))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("bits", "field"), CASES)
def test_ptx_zero_points(bits, field, dtype):
    """Every zero point of the width; the two words of a register may belong to rows with different ones."""
    words, bf16 = words_of(bits, field), dtype == BF16
    codes, text = codes_of(bits, field, words), text_of(bits, field, bf16, None, False)
    for zero in range(1 << bits) if bits < 8 else (0, 1, 100, 127, 128, 129, 200, 255):
        other = (zero * 5 + 3) % (1 << bits)
        constants = [constant(bits, field, value, bf16) for value in (zero, other)]
        low, high = half_values(run(text, [*map(paired, words), *constants]), dtype)
        assert torch.equal(low.double(), (codes - zero).double())
        assert torch.equal(high.double(), (codes - other).roll(12345).double())


@pytest.mark.parametrize("has_zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("bits", "field"), CASES)
def test_ptx_scaled(bits, field, dtype, has_zero):
    """With the scales of their rows the words give weights rounded once, to nearest even."""
    words, bf16 = words_of(bits, field), dtype == BF16
    scales = torch.tensor([0.0123, 0.456]).to(dtype)
    zeros = [1, (1 << bits) - 2] if has_zero else 2 * [1 << (bits - 1)]
    inputs = [*map(paired, words)]
    inputs += [constant(bits, field, zero, bf16) for zero in zeros] if has_zero else []
    inputs += [*(scales.view(torch.int16).long() & 0xFFFF)]
    text = text_of(bits, field, bf16, None if has_zero else zeros[0], True)
    codes = codes_of(bits, field, words)
    for found, zero, scale, shift in zip(half_values(run(text, inputs), dtype), zeros, scales, (0, 12345), strict=True):
        exact = (codes - zero).roll(shift).double() * scale.double()  # products of 9 by 11 bits are exact in float64
        assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("zero", [None, 1])
@pytest.mark.parametrize(("bits", "field"), CASES)
def test_operands(bits, field, zero, scaled):
    """The text reads every register that is asked for."""
    for bf16 in (False, True):
        text = text_of(bits, field, bf16, zero, scaled)
        count = constraints_of(bits, field, zero, scaled).count(",r")
        named = {int(word.strip("$,;}")) for word in text.split() if word.startswith("$")}
        assert named == set(range(count + 1))


def test_layout_in_constants():
    """The compiler's numbers are the layout's."""
    assert {bits: fields_of(bits) for bits in BITS} == FIELDS and {bits: planes_of(bits) for bits in BITS} == PLANES


@triton.jit
def unpack_kernel(
    words0,
    words1,
    words2,
    zeros,
    scales,
    out,
    field: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
):
    """All 65,536 words as [256, 256], a row for every zero point and scale."""
    o_words = tl.arange(0, 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    b_weights = weights(
        tl.load(words0 + o_words),
        tl.load(words1 + o_words),
        tl.load(words2 + o_words),
        tl.load(zeros + tl.arange(0, 256)),
        tl.load(scales + tl.arange(0, 256)),
        field,
        BITS,
        out.dtype.element_ty,
        HAS_ZERO,
        SCALED,
        PTX,
    )
    tl.store(out + o_words, b_weights)


@pytest.mark.parametrize("has_zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(FP16, id="fp16"),
        pytest.param(FP32, id="fp32"),
        pytest.param(BF16, id="bf16", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_BF16)),
    ],
)
@pytest.mark.parametrize(("bits", "field"), CASES)
def test_kernel(bits, field, dtype, has_zero, device):
    """The device function itself: the integer path in the interpreter, on a GPU that and, for NVIDIA's, PTX."""
    words = words_of(bits, field)
    zeros = torch.arange(256) % (1 << bits)
    offsets = zeros[:, None] if has_zero else 1 << (bits - 1)
    scales = (torch.rand(256) + 0.5).to(dtype)
    exact = (codes_of(bits, field, words).view(256, 256) - offsets).double()
    ways = {False, of(device).ptx and dtype != FP32}
    for way in ways:
        for scaled in (False, True):
            out = torch.full((256, 256), torch.nan, dtype=dtype, device=device)
            inputs = [word.to(torch.int16).to(device) for word in (words * 3)[:3]]
            arguments = (zeros.to(torch.uint8).to(device), scales.to(device), out, field, bits, has_zero, scaled, way)
            unpack_kernel[(1,)](*inputs, *arguments)
            expected = exact * scales.double()[:, None] if scaled else exact
            assert torch.equal(out.cpu(), expected.to(dtype))
