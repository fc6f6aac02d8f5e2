"""The operator vlmq::gemm_v1 under torch.compile, what importing it loads, and that the kernels compile for GPUs."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from kernel_problems import FP16, FP32, bound, make_weight, rel_rms

from vlmq_vllm.format import BITS
from vlmq_vllm.kernels import op, reference
from vlmq_vllm.kernels.layout import RuntimeWeight, prepare
from vlmq_vllm.kernels.tiles import TILES


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
