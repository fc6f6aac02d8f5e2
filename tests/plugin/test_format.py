"""The bit layout against words worked out by hand, against compressed-tensors, and against itself at odd sizes."""

import importlib.metadata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_vllm.format import BITS, QuantizedWeight, WeightFormat, pack, unpack

GOLDEN = {
    # codes in order, the first in the lowest bits; words as a hex editor shows them
    "2 bits": (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    "4 bits": (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
    "8 bits": (8, [1, 2, 3, 255], [0xFF030201]),
    "3 bits, across words": (3, [0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    "3 bits, one code too many": (3, [7] * 11, [0xFFFFFFFF, 0x1]),
    "4 bits, half a word": (4, [15, 0, 9], [0x90F]),
}


@pytest.mark.parametrize(("bits", "codes", "words"), GOLDEN.values(), ids=GOLDEN)
def test_golden_words(bits, codes, words):
    packed = pack(torch.tensor(codes), bits)
    assert [int(word) & 0xFFFFFFFF for word in packed] == words
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(st.sampled_from(BITS), st.integers(1, 200), st.integers(1, 5), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_packed_row_is_one_little_endian_number(bits, columns, rows, seed):
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack(packed, bits, columns), codes.to(torch.uint8))
    number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed[0]))
    assert number == sum(int(code) << (bits * i) for i, code in enumerate(codes[0]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_words_as_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    version = tuple(int(part) for part in importlib.metadata.version("compressed-tensors").split(".")[:2])
    if bits == 3 and version < (0, 18):
        pytest.skip("compressed-tensors before 0.18 left two bits of every word unused at 3 bits")
    codes = torch.randint(0, 1 << bits, (5, 96), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
    zeros = torch.randint(0, 1 << bits, (64, 3), dtype=torch.uint8)
    signed = (zeros.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(zeros.T, bits).T, helpers.pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "columns"),
    [(2, 16, 7, 64), (3, 32, 5, 100), (4, 128, 33, 130), (8, 64, 1, 1), (3, -1, 6, 77)],
)
def test_weight_survives_storage(bits, group_size, rows, columns, symmetric):
    format = WeightFormat(bits, group_size, symmetric)
    codes = torch.randint(0, format.levels, (rows, columns), dtype=torch.uint8)
    groups = format.groups(columns)
    scale = torch.rand(rows, groups).add(0.1).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(0, format.levels, (rows, groups), dtype=torch.uint8)
    weight = QuantizedWeight(format, codes, scale, zero)

    tensors = weight.tensors()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == format.shapes(rows, columns)
    again = QuantizedWeight.from_tensors(format, tensors).dequantize()

    for o, i in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)]:
        g = 0 if group_size == -1 else i // group_size
        offset = 1 << (bits - 1) if symmetric else int(zero[o, g])
        assert float(again[o, i]) == float(scale[o, g]) * (int(codes[o, i]) - offset)
    assert torch.equal(again, weight.dequantize())


def test_codes_that_are_too_wide_are_not_packed():
    """Such a code would overwrite its neighbour's bits; 255 is none of them at 8 bits."""
    for bits, fits in ((2, 3), (3, 7), (4, 15), (8, 255)):
        codes = torch.full((1, 32), fits, dtype=torch.uint8)
        scale = torch.ones(1, 1)
        QuantizedWeight(WeightFormat(bits, -1, True), codes, scale, None).tensors()
        if bits < 8:
            with pytest.raises(AssertionError, match="too wide"):
                QuantizedWeight(WeightFormat(bits, -1, True), codes + 1, scale, None).tensors()


@pytest.mark.parametrize(
    ("group_size", "columns", "width", "groups"),
    [(32, 96, 32, 3), (32, 100, 32, 4), (128, 96, 128, 1), (-1, 96, 96, 1), (-1, 77, 77, 1)],
)
def test_columns_that_share_a_scale(group_size, columns, width, groups):
    format = WeightFormat(4, group_size, True)
    assert (format.width(columns), format.groups(columns)) == (width, groups)
    assert format.group_of(columns).tolist() == [i // width for i in range(columns)]


def test_bits_per_weight_counts_scales_and_zero_points():
    assert WeightFormat(3, 128, True).bits_per_weight(4096, 4096) == 3 + 16 / 128
    assert WeightFormat(2, 64, False).bits_per_weight(4096, 4096) == 2 + (16 + 2) / 64


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "message"),
    [
        (5, 128, True, "bits is 5; vlmq has 2, 3, 4, 8"),
        (3, 48, True, "multiples of 32"),
        (2, 8, True, "multiples of 16"),
        (4, 0, True, "group_size is 0"),
        (4, -2, True, "group_size is -2"),
        ("3", 128, True, "of type int"),
        (3, 128, 1, "of type bool"),
    ],
)
def test_formats_that_do_not_exist(bits, group_size, symmetric, message):
    with pytest.raises(ValueError, match=message):
        WeightFormat(bits, group_size, symmetric)
