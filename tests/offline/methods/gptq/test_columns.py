"""The column solver's inner block in Triton against the same block in plain torch."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kernel_problems import FP32, rel_rms
from vlmq_vllm.offline.methods.gptq.columns import LEAF, ColumnPass

NAN = float("nan")
GROUPS = 4
FACTORS = ("factor", "push")


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    """Random, low .. high - 1, in float64."""
    return torch.randint(low, high, shape).double()


def links(chance: float, size: int, columns: range, count: int) -> torch.Tensor:
    """[count, size, size] with -1, 1 and many 0 above the diagonal of the block `columns`, NaN everywhere else."""
    block = slice(columns.start, columns.stop)
    found = torch.full((count, size, size), NAN).double()
    signs = integers(0, 2, count, len(columns), len(columns)) * 2 - 1
    above = torch.ones(len(columns), len(columns)).triu(1).bool()
    found[:, block, block] = torch.where(above, signs * (torch.rand(signs.shape) < chance), NAN)
    return found


def exact_state(problems: int, rows: int, columns: range, levels: int, pushed: bool) -> dict[str, torch.Tensor | None]:
    """A pass as it stands before the block `columns`, of eighths small enough for float32 to add and multiply exactly.

    What the block has no business with is NaN: other columns, their group, the factor below its diagonal, the values
    to be, and a problem before and one after those asked for, where rows too many would be read and written.
    """
    count, size, block = problems + 2, columns.stop + 3, slice(columns.start, columns.stop)
    shape, own = (count, size, rows), (count, len(columns), rows)
    state = {name: torch.full(shape, NAN).double() for name in ("remainder", "owed", "values")}
    state["codes"], state["loss"] = torch.full(shape, 77, dtype=torch.uint8), integers(0, 9, count, rows)
    pivots = integers(1, 3, count, size)
    state["factor"], state["push"] = links(0.15, size, columns, count), links(0.05, size, columns, count)
    state["factor"] *= pivots[:, None]  # owed / pivot is exact, too
    state["factor"].diagonal(dim1=1, dim2=2)[:, block] = pivots[:, block]
    state["owed"][:, block] = integers(-4, 5, *own) / 4 * pivots[:, block, None]
    state["scale"] = integers(2, 7, count, GROUPS + 1, rows) / 4
    state["zero"] = integers(0, levels, count, GROUPS + 1, rows)
    state["group_of"] = torch.full((count, size), GROUPS)
    state["group_of"][:, block] = torch.randint(0, GROUPS, (count, len(columns)))
    group = state["group_of"][:, block, None].expand(own)
    weight = (integers(0, levels, *own) - state["zero"].gather(1, group)) * state["scale"].gather(1, group)
    state["remainder"][:, block] = weight + integers(-12, 13, *own) / 8  # at both ends of the grid some lie beyond
    state["scale"][:, GROUPS], state["zero"][:, GROUPS] = NAN, NAN
    for name, tensor in state.items():
        tensor[[0, -1]] = {"codes": 77, "group_of": GROUPS}.get(name, NAN)
    return state if pushed else state | {"push": None, "values": None}


def sweep_in(state: dict, levels: int) -> ColumnPass:
    """The pass over the problems of `state` but the first and the last, which works in `state`."""
    own = {name: t if t is None else t[1:-1] for name, t in state.items()}
    given = (own[name] for name in ("remainder", "factor", "scale", "zero", "group_of"))
    sweep = ColumnPass(*given, levels, own["push"])
    sweep.owed, sweep.values, sweep.codes, sweep.loss = (own[name] for name in ("owed", "values", "codes", "loss"))
    return sweep


def single(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A copy on `device`, float32 if it was float64."""
    if tensor is None:
        return None
    return tensor.to(device, FP32 if tensor.is_floating_point() else tensor.dtype, copy=True)


@pytest.mark.parametrize("columns", [range(9, 9 + LEAF), range(5, 12), range(0, 1)], ids=str)
@pytest.mark.parametrize(
    ("problems", "rows", "levels", "pushed"),
    [(1, 1, 16, False), (3, 5, 4, False), (1, 130, 8, False), (3, 5, 256, False)]
    + [(1, 1, 4, True), (3, 5, 16, True), (1, 130, 8, True)],
)
def test_a_block_is_that_of_plain_torch_to_the_bit(problems, rows, levels, pushed, columns, device):
    """Halves between two codes and values beyond the grid among it; and nothing else is read or written."""
    state = exact_state(problems, rows, columns, levels, pushed)
    found = {name: single(tensor, device) for name, tensor in state.items()}
    if len(columns) == LEAF:
        found |= {name: t if t is None else t.mT.contiguous().mT for name, t in found.items() if name in FACTORS}
    sweep_in(state, levels)._columns_in_torch(columns.start, columns.stop)  # in float64
    sweep_in(found, levels)._columns_in_triton(columns.start, columns.stop)
    for name, tensor in found.items():
        if tensor is not None:
            expected, tensor = state[name], tensor.to(state[name])
            assert ((tensor == expected) | (tensor.isnan() & expected.isnan())).all(), name


def whole_pass(columns_of, pushed: bool, width: int | None, device: torch.device) -> ColumnPass:
    """A pass through `columns_of` over random weights; with `width` a group's grid is found at its first column."""
    torch.manual_seed(1)
    targets = torch.randn(2, 96, 24)
    inputs = torch.randn(2, 300, 24) @ torch.randn(2, 24, 96) + 0.1 * torch.randn(2, 300, 96)
    factor = torch.linalg.cholesky((inputs.mT @ inputs / 300).flip(1, 2)).flip(1, 2)
    push = 0.02 * torch.randn(2, 96, 96).triu(1) if pushed else None
    scale, zero = torch.rand(2, 6, 24) * 0.2 + 0.4, torch.randint(2, 6, (2, 6, 24)).float()
    order = torch.rand(2, 96).argsort() if width is None else torch.arange(96).expand(2, -1)
    given = [single(t, device) for t in (targets, factor, scale, zero, order // 16, push)]
    sweep = ColumnPass(*given[:5], 8, given[5])
    sweep._columns = partial(columns_of, sweep)
    if width is None:
        sweep.run()
    else:
        sweep.run(width, lambda own, first, last: (own.abs().amax(1) / 4, torch.full_like(own[:, 0], 4)))
    return sweep


@pytest.mark.parametrize(("pushed", "width"), [(False, None), (True, None), (True, 16)])
def test_a_pass_is_that_of_plain_torch(pushed, width, device):
    """Within the rounding of float32: the kernel adds up to 32 products in another order, and a GPU fuses multiplying
    and adding. That moves sums by some 2^-23 of them, and a value between two codes to the other: its row then differs.
    """
    expected = whole_pass(ColumnPass._columns_in_torch, pushed, width, device)
    found = whole_pass(ColumnPass._columns_in_triton, pushed, width, device)
    same = (found.codes == expected.codes).all(1)  # [B, O]
    assert same.float().mean() > (0.95 if device.type == "cuda" else 0.999)
    for name in ("remainder", "owed", "loss", "scale") + (("values",) if pushed else ()):
        actual, wanted = (getattr(sweep, name).transpose(1, -1)[same] for sweep in (found, expected))
        assert rel_rms(actual, wanted) < 2**-19, name


@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_device_chooses(is_cuda, monkeypatch):
    called = []
    for way in ("torch", "triton"):
        monkeypatch.setattr(ColumnPass, f"_columns_in_{way}", lambda self, *block, way=way: called.append((way, block)))
    sweep = object.__new__(ColumnPass)
    sweep.remainder = SimpleNamespace(is_cuda=is_cuda)
    sweep._columns(3, 7)
    assert called == [("triton" if is_cuda else "torch", (3, 7))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remainder": torch.zeros(1, 5, 40).mT}, "targets: .* must be contiguous torch.float32"),
        ({"group_of": torch.zeros(1, 40, dtype=torch.int32)}, "group_of: torch.int32 .* contiguous torch.int64"),
        ({"factor": torch.zeros(1, 40, 40).double()}, "factor: torch.float64"),
        ({"push": None}, "values and push come together"),
        ({}, "33 columns at once; the kernel's block is 32"),
    ],
)
def test_refused(change, message, device):
    state = exact_state(1, 5, range(37), 8, True)
    sweep = sweep_in({name: single(tensor, device) for name, tensor in state.items()}, 8)
    for name, tensor in change.items():
        setattr(sweep, name, tensor if tensor is None else tensor.to(device))
    with pytest.raises(ValueError, match=message):
        sweep._columns_in_triton(0, 33 if not change else 32)


WITHOUT_GPU = """
import subprocess, sys, torch
from vlmq_vllm.offline.methods.gptq.columns import LEAF, ColumnPass

sweep = ColumnPass(torch.ones(1, 4, 2), torch.eye(4)[None], *torch.ones(2, 1, 1, 2), torch.zeros(1, 4).long(), 4)
sweep.run()
print("triton" in sys.modules)
try:
    sweep._columns_in_triton(0, 4)
except ValueError as error:
    print(error)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from vlmq_vllm.offline.methods.gptq.columns_kernel import TILE, WARPS, columns_kernel

OPTIONS = dict(num_warps=WARPS, enable_fp_fusion=True)
names = columns_kernel.arg_names
types = {"codes": "*u8", "group_of": "*i64", "top": "fp32", "start": "i32", "count": "i32"}
types |= {name: "i32" for name in names if name.startswith(("n_", "stride_"))}

def compile(arch, pushed):
    given = dict(HAS_PUSH=pushed, BLOCK=LEAF, TILE=TILE, stride_factor_i=1)  # Triton makes constants of ones
    given |= dict(stride_push_k=1) if pushed else dict(push=None, values=None, n_rows=1, n_groups=1)
    signature = {name: "constexpr" if name in given else types.get(name, "*fp32") for name in names}
    source = ASTSource(columns_kernel, signature, given)
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS).asm["ptx"]
    target = ptx.split(".target ")[1].split()[0].strip(",")
    call = [get_ptxas(arch).path, "-v", "--gpu-name", target, "-o", sys.argv[1], "/dev/stdin"]
    said = subprocess.run(call, input=ptx, capture_output=True, text=True, check=True).stderr
    print(target, ptx.count("div.rn"), "div.full" in ptx, "0 bytes spill stores, 0 bytes spill loads" in said, sep=",")

for arch in (80, 90):
    for pushed in (False, True):
        compile(arch, pushed)
"""


def test_without_a_gpu(tmp_path):
    """A processor needs no Triton and is refused by the kernel, which compiles for GPUs: it keeps its tiles in
    registers and both divisions are IEEE's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    call = [sys.executable, "-c", WITHOUT_GPU, str(tmp_path / "cubin")]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "False",
        "targets are on cpu; Triton needs a GPU, or TRITON_INTERPRET=1 before the first import",
        *2 * ["sm_80,2,False,True"],
        *2 * ["sm_90a,2,False,True"],
    ], done.stderr
