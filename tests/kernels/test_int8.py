"""Products with activations of 8 bits: codes as bytes, the int8 kernel and the fused one against float64."""

import pytest
import torch

from kernel_problems import FP16, FP32, bound, empty, exact, make_weight, rel_rms
from vlmq_vllm.activations import quantize_tokens
from vlmq_vllm.format import BITS, WeightFormat
from vlmq_vllm.kernels import dispatch, gemm, hardware, int8, reference, torch_ops, warmup
from vlmq_vllm.kernels.layout import Geometry
from vlmq_vllm.kernels.repack import prepare

FORMATS = [pytest.param(b, s, id=f"w{b}-{'sym' if s else 'asym'}") for b in (4, 8) for s in (True, False)]
SHAPES = [  # rows, columns, group size
    pytest.param(1, 1, -1, id="1x1-row"),
    pytest.param(7, 33, 32, id="7x33-g32"),
    pytest.param(40, 200, 64, id="40x200-g64-partial"),
    pytest.param(129, 257, 128, id="129x257-g128-partial"),
    pytest.param(33, 160, 96, id="33x160-g96"),
    pytest.param(70, 600, 512, id="70x600-g512"),
    pytest.param(65, 520, -1, id="65x520-row"),
]


def tokens(m: int, columns: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [m, columns] in float16 and scales [m, 1]."""
    return quantize_tokens(torch.randn(m, columns, device=device).to(FP16) * torch.rand(m, 1, device=device).half())


def expected(q: torch.Tensor, token_scales: torch.Tensor, weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = token_scales.double() * exact(q, weight)
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_centred_codes(bits, rows, columns, group, width, device):
    """Each code less the middle, to the bit, in its row and column; in any piece."""
    weight = make_weight(bits, True, rows, columns, group, device=device)
    runtime = prepare(weight, width)
    stripes, wide = runtime.geometry.stripes, int8.filled_columns(runtime.geometry)
    whole = torch.full((64 * stripes, wide), -1, dtype=torch.int8, device=device)
    int8.centre(runtime, whole)
    middle = weight.format.middle
    assert torch.equal(whole[:rows, :columns].int(), weight.codes.int() - middle)
    assert (whole[rows:] == -middle).all() and (whole[:, columns:] == -middle).all()
    last = torch.full((64, wide), -1, dtype=torch.int8, device=device)
    assert torch.equal(int8.centre(runtime, last, stripes - 1), whole[-64:])


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_int8_kernel(bits, symmetric, rows, columns, group, device):
    """Sums of a group are exact; scales, tokens' scales and bias are rounded in float32 and the result once.

    In two pieces, with as few tokens as leave a tile mostly empty; an output is float32, where rounding does not hide.
    """
    weight = make_weight(bits, symmetric, rows, columns, group, device=device)
    runtime = prepare(weight)
    q, token_scales = tokens(5, columns, device)
    for bias in (None, torch.randn(rows, device=device).to(FP16)):
        wanted = expected(q, token_scales, weight, bias)
        out = int8.gemm(q, token_scales[:, 0], runtime, bias, empty(5, rows, dtype=FP32, device=device), piece=1)
        assert rel_rms(out, wanted) <= bound(FP32, columns)
        twin = reference.gemm(q, runtime, bias, token_scales)
        assert twin.dtype == FP16 and rel_rms(twin, wanted) <= bound(FP16, columns)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_more_than_a_tile(bits, symmetric, device):
    """Of tokens and of rows, whose last tile is ragged."""
    weight = make_weight(bits, symmetric, 200, 128, 64, device=device)
    q, token_scales = tokens(131, 128, device)
    out = int8.gemm(q, token_scales[:, 0], prepare(weight), out=empty(131, 200, device=device))
    assert rel_rms(out, expected(q, token_scales, weight)) <= bound(FP16, 128)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_largest_sums(symmetric, device):
    """Every code and every activation at its end: int32 sums as large as they get, exact against whole numbers."""
    weight = make_weight(8, symmetric, 3, 1024, -1, device=device)
    weight.codes.fill_(255)
    if not symmetric:
        weight.zero.zero_()
    weight.scale.fill_(2.0**-10)
    q = torch.full((2, 1024), -127.0, dtype=FP16, device=device)
    token_scales = torch.tensor([2.0**-5, 2.0**-6], device=device)
    out = int8.gemm(q, token_scales, prepare(weight), out=empty(2, 3, dtype=FP32, device=device))
    offset = 128 if symmetric else 0
    assert torch.equal(out, (token_scales * -127.0 * (255 - offset))[:, None].expand(2, 3))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_rows_too_wide_for_int32(symmetric, device, monkeypatch):
    """One scale per row: sums go on in float32 when an int32 could overflow, and give the same."""
    limit = (1 << 31) // (127 * 256)
    for columns, whole in ((limit - 200, True), (limit + 200, False)):
        assert int8.is_whole(Geometry.of(WeightFormat(8, -1, symmetric), 64, columns)) is whole
    weight = make_weight(8, symmetric, 40, 500, -1, device=device)
    q, token_scales = tokens(3, 500, device)
    monkeypatch.setattr(int8, "is_whole", lambda geometry: False)
    out = int8.gemm(q, token_scales[:, 0], prepare(weight), out=empty(3, 40, dtype=FP32, device=device))
    assert rel_rms(out, expected(q, token_scales, weight)) <= bound(FP32, 500)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_fused_kernel_with_token_scales(bits, symmetric, device):
    """Scales of tokens multiply float32 sums: products that float16 cannot hold come out where the result can."""
    weight = make_weight(bits, symmetric, 70, 2500, 64, device=device)
    runtime = prepare(weight)
    q, token_scales = tokens(9, 2500, device)
    q[0] = 127 * (weight.dequantize()[0] >= 0) - 127 * (weight.dequantize()[0] < 0)
    assert exact(q, weight)[0, 0] > torch.finfo(FP16).max
    token_scales[0] = 2.0**-8
    bias = torch.randn(70, device=device).to(FP16)
    out = gemm.gemm(q, runtime, bias, empty(9, 70, device=device), token_scales=token_scales[:, 0].contiguous())
    assert rel_rms(out, expected(q, token_scales, weight, bias)) <= bound(FP16, 2500)
    with pytest.raises(ValueError, match="token_scales has shape \\[9, 1\\]; this weight needs \\[9\\]"):
        gemm.gemm(q, runtime, bias, token_scales=token_scales)


def test_ways(device, monkeypatch):
    """The fused kernel up to the crossover and for batch-invariant products, int8 above; tokens of zeros are zero."""
    ways = []
    for module in (gemm, int8):
        monkeypatch.setattr(module, "gemm", _noting(ways, module.gemm, module.__name__))
    monkeypatch.setattr(dispatch, "INT8_FROM", 20)
    weights = [make_weight(bits, False, 20, 96, 32, device=device) for bits in (8, 4)]
    runtimes = [prepare(weight) for weight in weights]
    for m, invariant, way in ((19, False, gemm), (20, False, int8), (20, True, gemm)):
        ways.clear()
        q, token_scales = tokens(m, 96, device)
        q[3], token_scales[3] = 0, 0
        out = dispatch.multiply(q, runtimes, None, invariant, token_scales)
        assert set(ways) == {way.__name__}
        wanted = torch.cat([expected(q, token_scales, weight) for weight in weights], dim=-1)
        assert rel_rms(out, wanted) <= bound(FP16, 96) and not out[3].any()


def _noting(ways: list[str], real, name: str):
    def call(*args, **more):
        ways.append(name)
        return real(*args, **more)

    return call


def test_warm_up(device, monkeypatch):
    calls = []
    monkeypatch.setattr(warmup, "multiply", lambda x, weights, bias, invariant, scales: calls.append((len(x), scales)))
    monkeypatch.setattr(warmup, "_done", set())
    weights = [prepare(make_weight(4, True, 20, 96, 32, device=device))]
    for rounded in (False, True, True):
        warmup.warm(weights, FP16, with_bias=False, rounded=rounded)
    machine = hardware.of(torch.device(device))
    plain, rounded = warmup.tokens(machine), warmup.tokens(machine, dispatch.INT8_FROM)
    assert [m for m, scales in calls if scales is None] == plain
    assert [m for m, scales in calls if scales is not None] == rounded and dispatch.INT8_FROM in rounded


def arguments(runtimes, bias):
    shapes = [weight.geometry for weight in runtimes]
    tensors = [[getattr(weight, name) for weight in runtimes] for name in ("packed", "scales", "zeros")]
    numbers = [shape.bits for shape in shapes], [shape.format.group_size for shape in shapes]
    return (*tensors, bias, *numbers, [shape.rows for shape in shapes], shapes[0].columns, False)


@pytest.mark.parametrize(
    "call",
    [torch.ops.vlmq.linear_int8_v1, torch_ops.linear_on_gpu, torch_ops.linear_on_cpu],
    ids=["op", "on_gpu", "on_cpu"],
)
def test_op(call, device):
    """Leading dimensions of any number, widths side by side, both ways."""
    weights = [make_weight(b, s, n, 96, g, device=device) for b, s, n, g in ((8, True, 20, 32), (4, False, 70, -1))]
    bias = torch.randn(90, device=device).to(FP16)
    given = arguments([prepare(weight) for weight in weights], bias)
    for shape in ((96,), (2, 3, 96), (130, 96), (0, 96)):
        q, token_scales = quantize_tokens(torch.randn(*shape, device=device).to(FP16))
        wanted = torch.cat([expected(q, token_scales, weight) for weight in weights], dim=-1) + bias.double()
        out = call(q, token_scales, *given)
        assert out.shape == wanted.shape and out.dtype == FP16
        assert out.numel() == 0 or rel_rms(out, wanted) <= bound(FP16, 96)


def test_op_contract(device):
    given = arguments([prepare(make_weight(4, False, 20, 96, 32, device=device))], None)
    q, token_scales = quantize_tokens(torch.randn(2, 3, 96, device=device).to(FP16))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vlmq.linear_int8_v1.default, (q, token_scales, *given), test_utils=tests)


def test_steps_fit_into_groups():
    for group in (-1, 32, 64, 96, 128, 256, 384, 512, 4096):
        for bits in (4, 8):
            for columns in (1, 33, 700, 5000):
                shape = Geometry.of(WeightFormat(bits, group, True), 64, columns)
                step = int8.step_of(shape)
                assert step in (32, 64, 128) and int8.filled_columns(shape) % step == 0
                assert shape.group == -1 or (shape.group % step == 0 and shape.span % step == 0)
