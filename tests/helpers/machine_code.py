"""Compile the kernels for GPUs that are not there and count what the compiler made of them.

    python tests/helpers/machine_code.py ARCH < cases.json      (without TRITON_INTERPRET: an interpreted kernel cannot
    compile)

Cases are dictionaries for `compile_case`; a line of JSON comes back for each. Kernels are compiled from the arguments
of real launches, with tensors on the meta device. Triton brings ptxas and cuobjdump along.
"""

import json
import re
import subprocess
import sys

import torch

LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.MULTILINE)
INTEGER_MMA = ("IMMA", "IGMMA", "UTCIMMA")  # tensor core instructions of Ampere, Hopper, Blackwell
MMA = ("HMMA", "HGMMA", "UTCHMMA", *INTEGER_MMA)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int16: "i16"}
TYPES |= {torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8"}


def machine(arch: str):
    from vlmq_vllm.kernels.hardware import Hardware

    return Hardware(arch, 132, LIMITS[arch])


def launch(
    arch: str,
    bits: int,
    tokens: int,
    group: int = 128,
    symmetric: bool = True,
    rows: int = 3584,
    columns: int = 3584,
    slice: int | None = None,
    dtype: str = "bfloat16",
    kind: str = "gemm",
):
    """(kernel, arguments, tile, geometry) of the launch for this many tokens."""
    from vlmq_vllm.format import WeightFormat
    from vlmq_vllm.kernels import dequantize, experts, gemm, int8, repack, tiles
    from vlmq_vllm.kernels.expert_weights import ExpertWeights
    from vlmq_vllm.kernels.layout import Geometry, RuntimeWeight

    format = WeightFormat(bits, group, symmetric)
    shape = Geometry.of(format, rows, columns) if slice is None else Geometry(format, rows, columns, slice)
    plan = tiles.plan_for(tokens, shape, machine(arch))
    with torch.device("meta"):
        dtype = getattr(torch, dtype)
        packed = torch.empty(shape.packed_shape, dtype=torch.int16)
        scales = torch.empty(shape.scales_shape, dtype=dtype)
        zeros = None if symmetric else torch.empty(shape.scales_shape, dtype=torch.uint8)
        x, out = torch.empty(tokens, columns, dtype=dtype), torch.empty(tokens, rows, dtype=dtype)
        if kind == "gemm":
            weight, bias = RuntimeWeight(shape, packed, scales, zeros), torch.empty(rows, dtype=dtype)
            kernel, arguments = gemm.gemm_kernel, gemm.arguments(x, weight, bias, out, plan, machine(arch))
        elif kind == "experts":
            stacked = ExpertWeights(shape, *(part if part is None else part[None] for part in (packed, scales, zeros)))
            ids, router = torch.empty(tokens, 1, dtype=torch.int32), torch.empty(tokens, 1)
            kernel = experts.experts_kernel
            arguments = experts.arguments(x, stacked, ids, None, router, out, ids, ids, plan.tile, machine(arch))
        elif kind == "repack":
            words = torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32)
            kernel, arguments = repack.repack_kernel, repack.arguments(words, packed, 0, shape)
        elif kind == "centred":
            wide = torch.empty(64, int8.filled_columns(shape), dtype=torch.int8)
            kernel = int8.centre_kernel
            arguments = int8.centre_arguments(RuntimeWeight(shape, packed, scales, zeros), wide, 0)
        elif kind == "int8":
            weight, bias = RuntimeWeight(shape, packed, scales, zeros), torch.empty(rows, dtype=dtype)
            q, part = (torch.empty(n, int8.filled_columns(shape), dtype=torch.int8) for n in (tokens, rows))
            sums = None if symmetric else int8.step_sums(q, shape)
            each = torch.empty(tokens)
            kernel = int8.int8_kernel
            arguments = int8.arguments(q, sums, each, weight, part, 0, bias, out, machine(arch))
        else:
            kernel = dequantize.dequantize_kernel
            weight, wide = RuntimeWeight(shape, packed, scales, zeros), torch.empty(columns, 64, dtype=dtype)
            arguments = dequantize.arguments(weight, wide, 0, machine(arch))
    return kernel, arguments, plan.tile, shape


def compile_case(arch: str, **case) -> dict:
    """What a launch becomes: spills, shared bytes, tensor core instructions, copies, instructions per weight."""
    from vlmq_vllm.kernels.tiles import shared_bytes

    kernel, arguments, tile, shape = launch(arch, **case)
    compiled = compile_for(arch, kernel, arguments)
    found = {"shared": compiled.metadata.shared, "foretold": shared_bytes(tile, shape, machine(arch))}
    return found | count(arch, compiled, tile.rows * shape.span / (32 * tile.warps))


def compile_for(arch: str, kernel, arguments: dict):
    """The machine code of such a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    options["enable_fp_fusion"] = arguments.pop("enable_fp_fusion")  # every launch asks for it
    number = arch.removeprefix("sm_")
    target = GPUTarget("hip", arch, 64) if number == arch else GPUTarget("cuda", int(number), 32)
    return triton.compile(ASTSource(kernel, *specialise(kernel, arguments)), target=target, options=options)


def specialise(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """What Triton makes of a launch's arguments: their types, those that are constants, those divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def count(arch: str, compiled, per_thread: float) -> dict:
    """Spilled bytes, and for NVIDIA's what is in the loop over spans."""
    if not arch.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        spilled = re.findall(r"(?:ScratchSize|private_segment_fixed_size):?\s*(\d+)", text)
        found = {
            "spilled": max(map(int, spilled)),
            "mma": text.count("v_mfma"),
            "integer_mma": text.count("v_mfma_i32"),
            "divided": "global_atomic_add" in text,
        }
        return found | ({"awaited": stores_awaited(text)} if found["divided"] else {})
    listing = disassemble(compiled.asm["cubin"])
    names = [name for _, name, _ in listing]
    found = {
        "spilled": spills(compiled.asm["ptx"]),
        "mma": sum(name.startswith(MMA) for name in names),
        "copies": sum(name.startswith("LDGSTS") for name in names),
        "integer_mma": sum(name.startswith(INTEGER_MMA) for name in names),
    }
    loop = main_loop(listing)
    if loop:
        found |= {"per_weight": len(loop) / per_thread, "widest_copy": max(width(name) for name in loop)}
        found["spills_in_loop"] = sum(name.startswith(("LDL", "STL")) for name in loop)
    return found


def stores_awaited(text: str) -> bool:
    """Whether, in AMD's assembly, every wave waits for its stores before the barrier that precedes the count."""
    before = text[: text.find("global_atomic_add")].splitlines()
    whole = [" ".join(line.split(";")[0].split()) for line in before]
    barrier = max(i for i, line in enumerate(whole) if line == "s_barrier")
    stored = max(i for i, line in enumerate(whole[:barrier]) if "store" in line)
    return any(line.startswith("s_waitcnt vmcnt(0)") for line in whole[stored:barrier])


def spills(ptx: str) -> int:
    """Bytes that do not fit into registers, by ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"\.target (\w+)", ptx).group(1)
    tool = get_ptxas(int(re.search(r"\d+", arch).group()))
    call = [tool.path, "-v", "--gpu-name", arch, "-o", "/dev/null", "/dev/stdin"]
    said = subprocess.run(call, input=ptx, capture_output=True, text=True, check=True).stderr
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))


def disassemble(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, instruction, operands) of machine code."""
    import tempfile

    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(text)]


def main_loop(listing: list[tuple[int, str, str]]) -> list[str]:
    """The instructions of the shortest loop with tensor core instructions, () when there is none."""
    index = {address: i for i, (address, _, _) in enumerate(listing)}
    loops = []
    for i, (address, name, rest) in enumerate(listing):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target.group(1), 16) < address:
            body = [name for _, name, _ in listing[index.get(int(target.group(1), 16), i) : i + 1]]
            if any(name.startswith(MMA) for name in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def width(name: str) -> int:
    """Bytes a thread moves by one asynchronous copy."""
    if not name.startswith("LDGSTS"):
        return 0
    bits = re.search(r"\.(64|128)\b", name)
    return int(bits.group(1)) // 8 if bits else 4


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(compile_case(sys.argv[1], **case)), flush=True)
