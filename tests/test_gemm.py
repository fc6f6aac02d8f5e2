"""The kernels: runtime layout, plain-torch twin and Triton GEMM. Speed is not tested here."""

import pytest
import torch
from kernel_problems import BF16, FP16, FP32, bound, make_weight, rel_rms

from vlmq_vllm.format import BITS, WeightFormat
from vlmq_vllm.kernels import reference
from vlmq_vllm.kernels.gemm import gemm
from vlmq_vllm.kernels.layout import RuntimeWeight, prepare, why_not
from vlmq_vllm.kernels.tiles import TILES, pick_tile

FORMATS = [pytest.param(bits, sym, id=f"w{bits}-{'sym' if sym else 'asym'}") for bits in BITS for sym in (True, False)]
SHAPES = [  # rows, columns, group size
    pytest.param(1, 1, -1, id="1x1-row"),
    pytest.param(7, 33, 32, id="7x33-g32"),
    pytest.param(40, 200, 64, id="40x200-g64-partial"),
    pytest.param(65, 257, 128, id="65x257-g128-partial"),
    pytest.param(33, 160, 96, id="33x160-g96"),
]
NO_BF16 = "Triton's interpreter cuts bfloat16 results instead of rounding them; this needs a GPU"
DTYPES = [  # of x and scales, of the result
    pytest.param(FP16, FP16, id="fp16"),
    pytest.param(FP32, FP32, id="fp32"),
    pytest.param(BF16, FP32, id="bf16-fp32"),
    pytest.param(BF16, BF16, id="bf16", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_BF16)),
]


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_layout(bits, symmetric, rows, columns, group):
    """Words are those of Python's long integers, and the twin reads back exactly the checkpoint's weight."""
    weight = make_weight(bits, symmetric, rows, columns, group)
    runtime = prepare(weight, FP16)
    for row in (0, rows - 1):
        stream = sum(code << (bits * i) for i, code in enumerate(weight.codes[row].tolist()))
        found = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(runtime.packed[:, row].tolist()))
        assert found == stream
    assert (runtime.rows, runtime.columns) == (rows, columns)
    assert runtime.scales.dtype == weight.scale.dtype
    assert torch.equal(reference.dequantize(runtime), weight.dequantize())


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_identity(bits, symmetric, rows, columns, group, dtype, out_dtype, device):
    """Identity activations give the dequantised weight to the bit.

    One product per output is not zero, 1 * (code - zero), an integer below 2^8 and so exact in every dtype; its product
    with the scale is taken in float32 and rounded once, which is what `dequantize` does.
    """
    weight = make_weight(bits, symmetric, rows, columns, group, dtype, device)
    out = torch.full((columns, rows), torch.nan, dtype=out_dtype, device=device)
    gemm(torch.eye(columns, dtype=dtype, device=device), prepare(weight, dtype), out=out)
    assert torch.equal(out.T, weight.dequantize(out_dtype))


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_product(bits, symmetric, rows, columns, group, dtype, out_dtype, device):
    """Kernel and twin lie within rounding of the float64 product, and so within twice that of each other."""
    weight = make_weight(bits, symmetric, rows, columns, group, dtype, device)
    runtime = prepare(weight, dtype)
    x = torch.randn(17, columns, device=device).to(dtype)
    bias = torch.randn(rows, device=device).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float32).double().T + bias.double()
    twin = reference.gemm(x, runtime, bias)
    out = gemm(x, runtime, bias, out=torch.full((17, rows), torch.nan, dtype=out_dtype, device=device))
    assert twin.dtype == dtype and rel_rms(twin, exact) <= bound(dtype, columns)
    assert rel_rms(out, exact) <= bound(out_dtype, columns)
    assert rel_rms(out, twin) <= bound(dtype, columns) + bound(out_dtype, columns)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [0, 1, 3, 17, 64, 130])
def test_tokens(m, bits, device):
    """Every tile, each with rows and tokens left over, without a bias, into memory full of NaN."""
    weight = make_weight(bits, False, 70, 193, 64, device=device)
    x = torch.randn(m, 193, device=device).to(FP16)
    out = torch.full((m, 70), torch.nan, dtype=FP16, device=device)
    assert gemm(x, prepare(weight, FP16), out=out) is out
    exact = x.double() @ weight.dequantize().double().T
    assert m == 0 or rel_rms(out, exact) <= bound(FP16, 193)


def test_mixed_dtypes(device):
    """Scales, bias and activations may differ in dtype; rows of x may lie apart."""
    weight = make_weight(3, False, 40, 100, 32, BF16, device)
    x = torch.randn(5, 128, device=device).to(FP16)[:, :100]
    bias = torch.randn(40, device=device)
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    assert rel_rms(gemm(x, prepare(weight, FP16), bias), exact) <= bound(FP16, 100)


def test_tiles():
    """A step of the loop never crosses a group, and no tile is larger than the tokens ask for."""
    for m, tokens in ((1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (9999, 128)):
        for group in (-1, 32, 64, 96, 128, 160):
            tile = pick_tile(m, group)
            assert tile.tokens == tokens
            assert group == -1 or group % tile.columns == 0
    assert pick_tile(1, -1) == pick_tile(1, 128) == TILES[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": 4}, "packed has shape .* needs \\[16, 8\\]"),
        ({"bits": 2, "group_size": 16}, "group_size is 16; the kernels take multiples of 32"),
        ({"columns": 129}, "packed has shape \\[12, 8\\]; this weight needs \\[15, 8\\]"),
        ({"columns": 0}, "the weight is 8 x 0"),
        ({"packed": torch.zeros(12, 8)}, "packed is torch.float32; it must be int32"),
        ({"packed": torch.zeros(8, 12, dtype=torch.int32).T}, "packed has strides .* must be contiguous"),
        ({"scales": torch.ones(3, 8)}, "scales has shape \\[3, 8\\]; this weight needs \\[2, 8\\]"),
        ({"scales": torch.ones(2, 8, dtype=torch.float64)}, "it must be float16 or bfloat16 or float32"),
        ({"scales": torch.ones(2, 8, device="meta")}, "scales is on meta, the weight on cpu"),
        ({"zeros": torch.zeros(2, 8, dtype=torch.int32)}, "zeros is torch.int32; it must be uint8"),
    ],
)
def test_refused_weight(change, message):
    weight = vars(prepare(make_weight(3, False, 8, 128, 64), FP16))
    with pytest.raises(ValueError, match=message):
        RuntimeWeight(**weight | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 127)}, "last dimension must be the weight's 128"),
        ({"x": torch.ones(2, 128, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.ones(128, 2).T}, "must be \\[M, K\\] with dense rows"),
        ({"x": torch.ones(1, 2, 128)}, "must be \\[M, K\\] with dense rows"),
        ({"bias": torch.ones(1, 8)}, "bias has shape \\[1, 8\\]; this weight needs \\[8\\]"),
        ({"out": torch.ones(8, 2).T}, "out is .* must be a contiguous float tensor \\[2, 8\\]"),
        ({"out": torch.ones(2, 8, dtype=torch.int32)}, "out is torch.int32"),
    ],
)
def test_refused_input(change, message, device):
    weight = prepare(make_weight(3, False, 8, 128, 64, device=device), FP16)
    with pytest.raises(ValueError, match=message):
        gemm(weight=weight, **{name: x.to(device) for name, x in {"x": torch.ones(2, 128), **change}.items()})


def test_why_not():
    """One predicate: `prepare` gives its reason; what it lets pass is tested above."""
    assert why_not(WeightFormat(2, 16, True), 8, 64).startswith("group_size is 16")
    assert why_not(WeightFormat(3, 96, True), 8, 64) is None
    with pytest.raises(ValueError, match="--group-size 32, 64 or 128"):
        prepare(make_weight(4, True, 8, 64, 8), FP16)
    with pytest.raises(ValueError, match="activations of torch.int8 are not supported"):
        prepare(make_weight(4, True, 8, 64, 32), torch.int8)
