"""The kernels: runtime layout, plain-torch twin, Triton GEMM and operator. Speed is not tested here."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from vlmq_vllm.format import BITS, QuantizedWeight, WeightFormat
from vlmq_vllm.kernels import op, reference
from vlmq_vllm.kernels.gemm import gemm
from vlmq_vllm.kernels.layout import RuntimeWeight, prepare, why_not
from vlmq_vllm.kernels.tiles import TILES, pick_tile

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

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


def make_weight(bits, symmetric, rows, columns, group, dtype=FP16, device="cpu") -> QuantizedWeight:
    """Random codes and zero points, scales that make weights of about one half."""
    format = WeightFormat(bits, group, symmetric)
    groups = format.groups(columns)
    codes = torch.randint(0, format.levels, (rows, columns), dtype=torch.uint8, device=device)
    zero = None if symmetric else torch.randint(0, format.levels, (rows, groups), dtype=torch.uint8, device=device)
    scale = (torch.rand(rows, groups, device=device) + 0.5) / format.levels
    return QuantizedWeight(format, codes, scale.to(dtype), zero)


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of what is expected; NaN where either holds one."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def bound(dtype: torch.dtype, columns: int) -> float:
    """How far a product rounded to `dtype` may lie from the exact one, as relative RMS.

    Rounding the result moves no element by more than half a step, eps / 2. Before it, each of `columns` float32 sums
    loses up to 2^-23 (tensor cores cut instead of rounding); losses of random sign add up like sqrt(columns), and the
    factor 2 is the room for them not being quite so.
    """
    return torch.finfo(dtype).eps / 2 + 2 * columns**0.5 * 2**-23


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


def arguments(weight: RuntimeWeight, bias: torch.Tensor | None = None) -> tuple:
    """What the operator takes after x."""
    return (weight.packed, weight.scales, weight.zeros, bias, weight.bits, weight.group_size, weight.columns)


@pytest.mark.parametrize("call", [torch.ops.vlmq.gemm_v1, op.on_gpu, op.on_cpu], ids=["op", "on_gpu", "on_cpu"])
@pytest.mark.parametrize("bits", BITS)
def test_op(call, bits, device):
    """Leading dimensions of any number, none and 0 among them, and strides of any kind."""
    weight = prepare(make_weight(bits, False, 20, 96, 32, device=device), FP16)
    bias = torch.randn(20, device=device).to(FP16)
    wide = torch.randn(4, 2, 3, 96, device=device).to(FP16)
    for x in (wide, wide[0, 0, 0], wide[:, :, 1], wide.transpose(0, 2), wide[0, 0, 0].expand(5, 96), wide[:0]):
        exact = x.double() @ reference.dequantize(weight).double().T + bias.double()
        out = call(x, *arguments(weight, bias))
        assert out.shape == exact.shape and out.dtype == FP16
        assert out.numel() == 0 or rel_rms(out, exact) <= bound(FP16, 96)
    lines = torch.randn(96, 4, device=device).to(FP16).T
    out = call(lines, *arguments(weight))
    assert rel_rms(out, lines.double() @ reference.dequantize(weight).double().T) <= bound(FP16, 96)
    with pytest.raises(ValueError, match="last dimension must be the weight's 96"):
        call(wide[..., :95], *arguments(weight))


def test_op_contract(device):
    """Schema and fake are those of what is computed: shape, dtype, strides, no aliasing, no hidden writes."""
    weight = prepare(make_weight(3, True, 20, 96, -1, device=device), FP16)
    for x in (torch.randn(2, 3, 96, device=device).to(FP16), torch.randn(0, 96, device=device).to(FP16)):
        call = (x, *arguments(weight, torch.randn(20, device=device)))
        torch.library.opcheck(torch.ops.vlmq.gemm_v1.default, call, test_utils=("test_schema", "test_faketensor"))


def test_op_compiled(device):
    """One graph serves every number of tokens; a recompilation at the second would raise."""
    weight = prepare(make_weight(3, False, 20, 96, 32, device=device), FP16)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")  # traces as Inductor does, without a C++ compiler
    def layer(x):
        return torch.ops.vlmq.gemm_v1(x * 2, *arguments(weight)) + 1

    for m, stance in ((5, "default"), (17, "fail_on_recompile"), (2, "fail_on_recompile")):
        x = torch.randn(m, 96, device=device).to(FP16)
        with torch.compiler.set_stance(stance):
            out = layer(x)
        assert torch.equal(out, torch.ops.vlmq.gemm_v1(x * 2, *arguments(weight)) + 1)


def test_op_defined_twice():
    before = torch.ops.vlmq.gemm_v1.default
    importlib.reload(op)
    assert torch.ops.vlmq.gemm_v1.default is before
    weight = prepare(make_weight(4, True, 8, 32, 32), FP32)
    assert torch.equal(before(torch.eye(32), *arguments(weight)).T, reference.dequantize(weight))


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT_IMPORT = """
import sys, torch, vlmq_vllm.kernels.op, vlmq_vllm.kernels.reference
print({"triton", "vllm"} & set(sys.modules), torch.cuda.is_initialized())

from vlmq_vllm.kernels.layout import RuntimeWeight
from vlmq_vllm.kernels.gemm import gemm
try:
    gemm(torch.ones(1, 32), RuntimeWeight(torch.zeros(4, 8, dtype=torch.int32), torch.ones(1, 8), None, 4, 32, 32))
except ValueError as error:
    print(error, torch.cuda.is_initialized())
"""


def test_light_import():
    """Operator and twin load neither Triton nor vLLM and touch no GPU; without interpreter the kernel refuses a CPU."""
    lines = run_python(LIGHT_IMPORT).splitlines()
    assert lines == [
        "set() False",
        "x is on cpu; Triton needs a GPU, or TRITON_INTERPRET=1 before the first import False",
    ]


CROSS_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlmq_vllm.format import BITS
from vlmq_vllm.kernels.gemm import gemm_kernel
from vlmq_vllm.kernels.tiles import TILES

types = {"packed": "*i32", "zeros": "*u8", **dict.fromkeys(("M", "N", "K", "stride_x", "stride_out"), "i32")}

def compile(bits, dtype, tile, zeros=True, N=None):
    given = dict(BITS=bits, GROUP=128, HAS_ZERO=zeros, HAS_BIAS=True, INTERP=False)
    given |= dict(BM=tile.tokens, BN=tile.rows, BK=tile.columns)
    given |= ({} if zeros else {"zeros": None}) | ({"N": N} if N else {})
    names = gemm_kernel.arg_names
    signature = {name: "constexpr" if name in given else types.get(name, "*" + dtype) for name in names}
    # What Triton assumes of a real call: torch's memory is aligned, M is left open.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in {"M", *given}}
    source = ASTSource(gemm_kernel, signature, given, aligned)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    done = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    tensor_core = "mma.sync" in done.asm["ptx"] or "wgmma.mma_async" in done.asm["ptx"]
    print(bits, dtype, tile.tokens, zeros, N, done.metadata.shared, tensor_core, len(done.asm["cubin"]), sep=",")

for bits in BITS:
    for tile in TILES:
        compile(bits, "bf16", tile)
    compile(bits, "fp16", TILES[0])
    compile(bits, "bf16", TILES[0], zeros=False, N=1)  # Triton makes a constant of an argument that is 1
"""


@pytest.mark.parametrize(("arch", "limit"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_cross_compile(arch, limit, tmp_path):
    """Every width and tile becomes machine code with tensor core instructions that fits the GPU; no GPU is needed.

    A process of its own, since a kernel imported for the interpreter cannot be compiled.
    """
    code = CROSS_COMPILE.replace("ARCH", str(arch))
    lines = [line.split(",") for line in run_python(code, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    assert len(lines) == len(BITS) * (len(TILES) + 2)
    for *kernel, shared, tensor_core, size in lines:
        assert 0 < int(shared) <= limit, f"{kernel} takes {shared} bytes of shared memory, sm_{arch} has {limit}"
        assert tensor_core == "True" and int(size) > 0, kernel
