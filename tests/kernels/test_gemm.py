"""The fused kernel: every width, group, path and odd size against float64. Speed is not tested here."""

import pytest
import torch

from kernel_problems import BF16, FORMATS, FP16, FP32, bound, empty, exact, make_weight, rel_rms
from vlmq_vllm.format import BITS
from vlmq_vllm.kernels import reference
from vlmq_vllm.kernels.gemm import gemm
from vlmq_vllm.kernels.repack import prepare
from vlmq_vllm.kernels.tiles import Plan, Tile

SHAPES = [  # rows, columns, group size
    pytest.param(1, 1, -1, id="1x1-row"),
    pytest.param(7, 33, 32, id="7x33-g32"),
    pytest.param(40, 200, 64, id="40x200-g64-partial"),
    pytest.param(129, 257, 128, id="129x257-g128-partial"),
    pytest.param(33, 160, 96, id="33x160-g96"),
]
# Ways that the tables choose for larger sizes: scales in the weight, up to 256 rows of which stripes are left over.
DECODE = Plan(Tile(64, 8, 2, 2))
PLANS = [
    pytest.param(DECODE, id="decode"),
    pytest.param(Plan(Tile(128, 16, 4, 2)), id="small"),
    pytest.param(Plan(Tile(256, 32, 8, 2, scaled=True)), id="prefill"),
]
NO_BF16 = "Triton's interpreter cuts bfloat16 results instead of rounding them; this needs a GPU"
DTYPES = [  # of x and scales, of the result
    pytest.param(FP16, FP16, id="fp16"),
    pytest.param(BF16, FP32, id="bf16-fp32"),
    pytest.param(BF16, BF16, id="bf16", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_BF16)),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_identity(bits, symmetric, rows, columns, group, plan, device):
    """Identity activations give the dequantised weight to the bit.

    One product per output is not zero, 1 * (code - zero), an integer below 2^8 and so exact in every dtype; its product
    with the scale is taken in float32 and rounded once, which is what `dequantize` does. With the scale in the weight
    the product is rounded there, and the rest is exact.
    """
    weight = make_weight(bits, symmetric, rows, columns, group, device=device)
    some = torch.linspace(0, columns - 1, min(columns, 9), device=device).long()  # more than a tile of "decode" has
    x = torch.eye(columns, dtype=FP16, device=device)[some]
    out = gemm(x, prepare(weight), out=empty(len(some), rows, device=device), plan=plan)
    assert torch.equal(out.T, weight.dequantize(FP16)[:, some])


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_product(bits, symmetric, rows, columns, group, dtype, out_dtype, device):
    """Kernel and twin lie within rounding of the float64 product, and so within twice that of each other."""
    weight = make_weight(bits, symmetric, rows, columns, group, dtype, device)
    runtime = prepare(weight)
    x = torch.randn(5, columns, device=device).to(dtype)
    bias = torch.randn(rows, device=device).to(dtype)
    expected = exact(x, weight, bias)
    twin = reference.gemm(x, runtime, bias)
    out = gemm(x, runtime, bias, empty(5, rows, dtype=out_dtype, device=device))
    assert twin.dtype == dtype and rel_rms(twin, expected) <= bound(dtype, columns)
    assert rel_rms(out, expected) <= bound(out_dtype, columns)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_paths(bits, dtype, out_dtype, plan, device):
    """Every way with every type of activations, more tokens than a tile has."""
    weight = make_weight(bits, False, 70, 300, 64, dtype, device)
    x = torch.randn(35, 300, device=device).to(dtype)
    out = gemm(x, prepare(weight), out=empty(35, 70, dtype=out_dtype, device=device), plan=plan)
    rounded = 0 if not plan.tile.scaled else torch.finfo(dtype).eps / 2  # the weight, in x's type
    assert rel_rms(out, exact(x, weight)) <= bound(out_dtype, 300) + rounded


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [0, 1, 9, 17, 33, 70])
def test_tokens(m, bits, device):
    """Every tile of the tables, each with rows and tokens left over, without a bias, into memory full of NaN."""
    weight = make_weight(bits, False, 70, 193, 64, device=device)
    x = torch.randn(m, 193, device=device).to(FP16)
    out = empty(m, 70, device=device)
    assert gemm(x, prepare(weight), out=out) is out
    assert m == 0 or rel_rms(out, exact(x, weight)) <= bound(FP16, 193, rounded_weight=m > 16)


@pytest.mark.parametrize("group", [32, 512, -1])
@pytest.mark.parametrize("bits", BITS)
def test_parts(bits, group, device):
    """K in parts, of which the last is shorter and ends inside a span, twice in the same memory: counters are reset."""
    weight = prepare(make_weight(bits, False, 40, 1100, group, device=device))
    x = torch.randn(5, 1100, device=device).to(FP16)
    expected = gemm(x, weight, plan=DECODE)
    for splits in {3, weight.geometry.spans}:
        plan = Plan(DECODE.tile, splits)
        outs = [gemm(x, weight, out=empty(5, 40, device=device), plan=plan) for _ in range(2)]
        assert torch.equal(*outs)
        assert rel_rms(outs[0], expected) <= 2 * bound(FP16, 1100)


@pytest.mark.parametrize(("bits", "slice"), [(2, 16), (2, 64), (3, 16), (3, 32), (4, 32), (8, 32)])
def test_slices(bits, slice, device):
    """Every width of slices that the layout may have."""
    weight = make_weight(bits, True, 65, 300, 64, device=device)
    x = torch.randn(3, 300, device=device).to(FP16)
    out = gemm(x, prepare(weight, slice), out=empty(3, 65, device=device))
    assert rel_rms(out, exact(x, weight)) <= bound(FP16, 300)


def test_mixed_dtypes(device):
    """Scales may differ in dtype from activations, also where they would multiply the weight; out may have gaps."""
    weight = make_weight(3, False, 40, 100, 32, BF16, device)
    x = torch.randn(5, 100, device=device).to(FP16)
    out = empty(5, 64, device=device)
    for plan in (DECODE, Plan(Tile(64, 16, 4, 2, scaled=True))):
        gemm(x, prepare(weight), out=out[:, 3:43], plan=plan)
        assert rel_rms(out[:, 3:43], exact(x, weight)) <= bound(FP16, 100)
    assert out[:, :3].isnan().all() and out[:, 43:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 127).half()}, "last dimension must be the weight's 128"),
        ({"x": torch.ones(2, 128)}, "x is torch.float32; it must be float16 or bfloat16"),
        ({"x": torch.ones(128, 2).half().T}, "must be \\[M, K\\] and contiguous"),
        ({"x": torch.ones(1, 2, 128).half()}, "must be \\[M, K\\] and contiguous"),
        ({"bias": torch.ones(1, 8).half()}, "bias has shape \\[1, 8\\]; this weight needs \\[8\\]"),
        ({"bias": torch.ones(8)}, "bias is torch.float32; it must be float16"),
        ({"out": torch.ones(8, 2).half().T}, "out is .* must be float \\[2, 8\\] with dense rows"),
        ({"out": torch.ones(2, 8, dtype=torch.int32)}, "out is torch.int32"),
        ({"plan": Plan(Tile(96, 8, 2, 2))}, "rows is 96"),
        ({"plan": Plan(DECODE.tile, 9)}, "splits is 9; K has 1 spans"),
    ],
)
def test_refused(change, message, device):
    weight = prepare(make_weight(3, False, 8, 128, 64, device=device))
    arguments = {"x": torch.ones(2, 128).half(), **change}
    with pytest.raises(ValueError, match=message):
        gemm(weight=weight, **{name: x.to(device) if hasattr(x, "to") else x for name, x in arguments.items()})
