"""The runtime layout: words bit by bit, the way there from a checkpoint's tensors, shards as vLLM cuts them."""

import pytest
import torch

from kernel_problems import BF16, FORMATS, FP16, make_weight
from vlmq_vllm.format import BITS, WeightFormat
from vlmq_vllm.kernels import reference, repack
from vlmq_vllm.kernels.layout import FIELDS, SLICES, Geometry, RuntimeWeight, aligned, why_not
from vlmq_vllm.kernels.repack import prepare

SHAPES = [  # rows, columns, group size
    pytest.param(1, 1, -1, id="1x1-row"),
    pytest.param(7, 33, 32, id="7x33-g32"),
    pytest.param(65, 257, 128, id="65x257-g128-partial"),
    pytest.param(33, 160, 96, id="33x160-g96"),
    pytest.param(130, 600, 512, id="130x600-g512"),
]


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_round_trip(bits, symmetric, rows, columns, group, device):
    """For every slice: the kernel writes the twin's words, and the twin reads the checkpoint's weight in them."""
    weight = make_weight(bits, symmetric, rows, columns, group, device=device)
    packed = weight.tensors()["weight_packed"]
    for slice in SLICES[bits]:
        if group != -1 and group % slice:
            continue
        runtime = prepare(weight, slice)
        geometry = runtime.geometry
        assert geometry.slice == slice and runtime.scales.dtype == weight.scale.dtype
        assert torch.equal(reference.to_words(weight.codes, geometry), runtime.packed)
        assert torch.equal(repack._by_torch([packed], geometry), runtime.packed)
        assert torch.equal(reference.from_words(runtime.packed, geometry), weight.codes)
        assert torch.equal(reference.dequantize(runtime), weight.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_words(bits):
    """Each code alone, at the place that the layout's description gives it."""
    geometry = Geometry(WeightFormat(bits, -1, True), 70, 600, SLICES[bits][0])
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        n, k = (int(torch.randint(0, size, (), generator=draw)) for size in (70, 600))
        codes = torch.zeros(70, 600, dtype=torch.uint8)
        codes[n, k] = (1 << bits) - 1
        words = reference.to_words(codes, geometry).int() & 0xFFFF
        span, inside = divmod(k, geometry.span)
        field, w = divmod(inside, geometry.slice)
        column = words[n // 64, span, :, n % 64]
        assert int(words.sum()) == int(column.sum())  # nothing anywhere else
        if bits == 3 and field == 15:
            expected = {plane * geometry.slice + w: 1 << 15 for plane in range(3)}
        elif bits == 3:
            expected = {field // 5 * geometry.slice + w: 7 << 3 * (field % 5)}
        else:
            expected = {w: (1 << bits) - 1 << bits * field}
        assert {int(i): int(column[i]) for i in column.nonzero()} == expected


@pytest.mark.parametrize("way", ["kernel", "torch"])
@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True), (2, False)])
def test_parts(bits, symmetric, way, device, monkeypatch):
    """Parts of a fused layer end inside tiles of 64 rows (heads of 80 rows, say); filled-up rows stay zero."""
    if way == "torch":
        monkeypatch.setattr(repack, "_by_kernel", repack._by_torch)
        monkeypatch.setattr(repack, "STRIP", 64)
    parts = [make_weight(bits, symmetric, rows, 96, 32, device=device) for rows in (80, 3, 64, 50)]
    runtime = repack.repack(parts[0].format, [part.tensors() for part in parts])
    assert torch.equal(reference.dequantize(runtime), torch.cat([part.dequantize() for part in parts]))
    assert not reference.from_words(runtime.packed, Geometry(parts[0].format, 256, 96, runtime.geometry.slice))[
        197:
    ].any()
    assert not runtime.scales[:, 197:].any()


# Projections of Qwen2-VL-7B and 72B, whole and as tensor-parallel ranks hold them, and columns filled up to spans.
SHARDS = [
    (3, 128, 18944, 18944),  # 37 spans of 512
    (3, 128, 18944 // 2, 9728),  # 18.5 spans of 512, filled up by 2.7 %
    (3, 128, 18944 // 4, 4864),  # 9.25: by 8.1 %, so slices of 16 by 2.7 %
    (4, 128, 18944 // 4, 4864),
    (4, 128, 29568, 29696),
    (2, 128, 29568, 29696),
    (4, 32, 3584, 3584),
    (2, -1, 3584 // 8, 512),
]


@pytest.mark.parametrize(("bits", "group", "columns", "filled"), SHARDS)
def test_filled_up(bits, group, columns, filled):
    """The usual slice unless a narrower one saves more than a 32nd; never more than that above the least possible."""
    geometry = Geometry.of(WeightFormat(bits, group, True), 64, columns)
    assert geometry.spans * geometry.span == filled
    narrowest = min(width for width in SLICES[bits] if group == -1 or group % width == 0) * FIELDS[bits]
    assert filled * 32 <= -(-columns // narrowest) * narrowest * 33


def test_takes_what_weights_take():
    """3 bits are 3 bits: words of a weight that fills its spans have the checkpoint's size."""
    for bits in BITS:
        geometry = Geometry.of(WeightFormat(bits, 128, True), 128, 1024)
        assert torch.empty(geometry.packed_shape, dtype=torch.int16).nbytes == 128 * 1024 * bits // 8


def test_why_not():
    """One predicate: `prepare` gives its reason; what it lets pass is tested above."""
    assert why_not(WeightFormat(2, 16, True), 8, 64).startswith("group_size is 16")
    assert why_not(WeightFormat(3, 96, True), 8, 64) is None
    assert "1 to 16777216 rows" in why_not(WeightFormat(3, 96, True), 8, 1 << 25)
    assert "34359738368 weights at most" in why_not(WeightFormat(3, 96, True), 1 << 20, 1 << 20)
    with pytest.raises(ValueError, match="--group-size 32, 64 or 128"):
        prepare(make_weight(4, True, 8, 64, 8))
    with pytest.raises(ValueError, match="slice is 64; at 4 bits with group_size 32 it must be 32"):
        prepare(make_weight(4, True, 8, 64, 32), slice=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(1, 1, 48, 64)}, "packed is torch.float32; it must be int16"),
        ({"packed": torch.zeros(2, 1, 48, 64, dtype=torch.int16)}, "packed has shape .* needs \\[1, 1, 48, 64\\]"),
        ({"packed": torch.zeros(1, 1, 64, 48, dtype=torch.int16).mT}, "packed has strides .* must be contiguous"),
        ({"scales": torch.ones(3, 64)}, "scales has shape \\[3, 64\\]; this weight needs \\[4, 64\\]"),
        ({"scales": torch.ones(4, 64, dtype=torch.float64)}, "it must be float16 or bfloat16 or float32"),
        ({"scales": torch.ones(4, 64, device="meta")}, "scales is on meta, the weight on cpu"),
        ({"zeros": torch.zeros(4, 64, dtype=torch.int32)}, "zeros is torch.int32; it must be uint8"),
        ({"zeros": None}, "an asymmetric one needs them"),
    ],
)
def test_refused_weight(change, message):
    weight = vars(prepare(make_weight(3, False, 8, 128, 64, BF16))) | {
        "geometry": Geometry(WeightFormat(3, 64, False), 8, 128, 16)
    }
    with pytest.raises(ValueError, match=message):
        RuntimeWeight(**weight | change)


def test_aligned():
    """Nothing is copied that need not be."""
    dense = torch.zeros(4, 16, dtype=FP16)
    assert aligned(dense) is dense
    for other in (dense.T, dense.view(-1)[1:]):
        copy = aligned(other)
        assert torch.equal(copy, other) and copy.is_contiguous() and copy.data_ptr() % 16 == 0
