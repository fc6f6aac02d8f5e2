"""The operator vlmq::linear_v1: shapes and strides, its contract, torch.compile, and what importing it loads."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from kernel_problems import FP16, bound, exact, make_weight, rel_rms
from vlmq_vllm.kernels import reference, torch_ops
from vlmq_vllm.kernels.layout import RuntimeWeight
from vlmq_vllm.kernels.repack import prepare


def arguments(weights: list[RuntimeWeight], bias: torch.Tensor | None = None) -> tuple:
    """What the operator takes after x."""
    shapes = [weight.geometry for weight in weights]
    numbers = [[getattr(shape, name) for shape in shapes] for name in ("bits", "rows")]
    groups = [shape.format.group_size for shape in shapes]
    tensors = [[getattr(weight, name) for weight in weights] for name in ("packed", "scales", "zeros")]
    return (*tensors, bias, numbers[0], groups, numbers[1], shapes[0].columns, False)


@pytest.fixture
def layer(device):
    """A fused layer of three widths, grids and groups, as the checkpoint has them."""
    kinds = (3, True, 20, 32), (2, False, 70, 96), (4, True, 5, -1)
    return [make_weight(bits, symmetric, rows, 96, group, device=device) for bits, symmetric, rows, group in kinds]


LINEAR = map(torch_ops.without_scales, (torch_ops.linear_on_gpu, torch_ops.linear_on_cpu))


@pytest.mark.parametrize("call", [torch.ops.vlmq.linear_v1, *LINEAR], ids=["op", "on_gpu", "on_cpu"])
def test_op(call, layer, device):
    """Leading dimensions of any number, none and 0 among them, and strides of any kind; widths side by side."""
    given = arguments([prepare(weight) for weight in layer], torch.randn(95, device=device).to(FP16))
    wide = torch.randn(4, 2, 3, 96, device=device).to(FP16)
    lines = torch.randn(96, 4, device=device).to(FP16).T
    shifted = torch.randn(2 * 96 + 1, device=device).to(FP16)[1:].view(2, 96)  # not aligned to 16 bytes
    inputs = (wide, wide[0, 0, 0], wide[:, :, 1], wide.transpose(0, 2), wide[0, 0, 0].expand(5, 96), lines, shifted)
    for x in inputs:
        expected = torch.cat([exact(x, weight) for weight in layer], dim=-1) + given[3].double()
        out = call(x, *given)
        assert out.shape == expected.shape and out.dtype == FP16 and rel_rms(out, expected) <= bound(FP16, 96)
    assert call(wide[:0], *given).shape == (0, 2, 3, 95)
    with pytest.raises(ValueError, match="last dimension must be the weight's 96"):
        call(wide[..., :60], *given)


def test_op_contract(layer, device):
    """Schema and fake are those of what is computed: shape, dtype, strides, no aliasing, no hidden writes."""
    given = arguments([prepare(weight) for weight in layer], torch.randn(95, device=device).to(FP16))
    for x in (torch.randn(2, 3, 96, device=device).to(FP16), torch.randn(0, 96, device=device).to(FP16)):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.vlmq.linear_v1.default, (x, *given), test_utils=tests)


def test_op_compiled(layer, device):
    """One graph serves every number of tokens; a recompilation at the second would raise."""
    given = arguments([prepare(weight) for weight in layer])

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")  # traces as Inductor does, without a C++ compiler
    def run(x):
        return torch.ops.vlmq.linear_v1(x * 2, *given) + 1

    for m, stance in ((5, "default"), (17, "fail_on_recompile"), (2, "fail_on_recompile")):
        x = torch.randn(m, 96, device=device).to(FP16)
        with torch.compiler.set_stance(stance):
            out = run(x)
        assert torch.equal(out, torch.ops.vlmq.linear_v1(x * 2, *given) + 1)


def test_op_defined_twice():
    before = torch.ops.vlmq.linear_v1.default
    importlib.reload(torch_ops)
    assert torch.ops.vlmq.linear_v1.default is before
    weight = prepare(make_weight(4, True, 8, 32, 32))
    out = before(torch.eye(32).half(), *arguments([weight]))
    assert torch.equal(out.T, reference.dequantize(weight).half())


LIGHT_IMPORT = """
import sys, torch, vlmq_vllm.kernels.torch_ops, vlmq_vllm.kernels.reference
print({"triton", "vllm"} & set(sys.modules), torch.cuda.is_initialized())

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.kernels.layout import Geometry, RuntimeWeight
from vlmq_vllm.kernels.gemm import gemm
geometry = Geometry.of(WeightFormat(4, 32, True), 8, 32)
weight = RuntimeWeight(
    geometry, torch.zeros(geometry.packed_shape, dtype=torch.int16), torch.ones(geometry.scales_shape), None
)
try:
    gemm(torch.ones(1, 32).half(), weight)
except ValueError as error:
    print(error, torch.cuda.is_initialized())
"""


def test_light_import():
    """Operator and twin load neither Triton nor vLLM and touch no GPU; without interpreter the kernel refuses a CPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = [sys.executable, "-c", LIGHT_IMPORT]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "set() False",
        "x is on cpu; Triton needs a GPU, or TRITON_INTERPRET=1 before the first import False",
    ], done.stderr
