"""Measures vlmq's kernels beside Humming, Marlin, Machete, GemLite, vLLM's own kernels and cuBLAS, on one GPU.

    python benchmarks/kernel/speed.py --first-minute       # what the machine can do at all
    python benchmarks/kernel/speed.py --out kernels.jsonl  # everything, in nine minutes at most
    python benchmarks/kernel/speed.py --shapes 7b-down --tokens 1 8 --bits 2 --peers cublas humming

W4A8 and W8A8, with activations of 8 bits, are measured from 128 tokens on, where int8 tensor cores take over, beside
products of the same weights with activations of 16 bits; at 8 bits a weight has one scale per row, as its peers have.

The important cases come first; what --seconds leaves no time for is listed. A kernel whose result is wrong has no
speed: a peer is listed as failed, and if it is ours there is no table at all and the exit status is 1. FILE gets a
JSON line for every figure as it is found, and its neighbour with the suffix .md the tables (`speed_report.py`). Cases
are in `cases.py`, the peers in `contenders.py`; `gpu_timing.py` says how time is taken.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path
from time import monotonic

import torch

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path

from benchmarks.journal import Journal
from benchmarks.kernel import gpu_limits, gpu_timing
from benchmarks.kernel.bench import Bench, Lost, Refused
from benchmarks.kernel.cases import BITS, INT8_BITS, NAMES, TOKENS, Block, chosen, ordered
from benchmarks.kernel.contenders import DENSE, KERNELS, OURS, OURS_INT8, OWN, PEERS
from benchmarks.kernel.measured_weight import Clock, Setting
from benchmarks.kernel.speed_report import report
from benchmarks.provenance import installed, nvidia_smi, public

BEGAN = monotonic()
PACKAGES = ("torch", "triton", "vllm", "humming-kernels", "gemlite")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compare(bench: Bench, blocks: list[Block]) -> None:
    """Every case of the blocks, ours first."""
    bench.preflight(blocks)
    for block in blocks:
        bench.run(block)
        gpu_timing.release()
        bench.journal.tables()  # so that there are some, should this process be ended from outside
        print(f"{monotonic() - BEGAN:.0f} s: {block.label}", file=sys.stderr)


def present(names: list[str], journal: Journal) -> list[str]:
    """Those of the kernels that can run here; the journal is told of the others. Raises Refused if ours cannot."""
    absent = {name: KERNELS[name].why_absent() for name in names}
    for name, reason in absent.items():
        if reason and name in OWN.values():
            raise Refused(reason)
        if reason:
            journal.add("absent", kernel=name, reason=reason)
    return [name for name, reason in absent.items() if not reason]


def run(args: argparse.Namespace, setting: Setting, journal: Journal) -> None:
    clock = Clock(BEGAN + args.seconds, args.peer_seconds)
    layers = chosen(args.shapes)
    if args.first_minute:
        for block in ordered(layers, [4], args.tokens, []):  # of any width: only the dense product is measured
            Bench(setting, [DENSE], journal, clock).run(block)
    else:
        names = present([OURS_INT8, OURS, *args.peers], journal)
        compare(Bench(setting, names, journal, clock), ordered(layers, args.bits, args.tokens, args.int8_bits))


def guarded(args: argparse.Namespace, setting: Setting, journal: Journal) -> str | None:
    """Run, print the tables, and return why the exit status must not be 0."""
    trouble = None
    try:
        run(args, setting, journal)
    except Refused as error:
        journal.drop(lambda line: line["kind"] == "speed" and line["kernel"] in OWN.values())
        journal.add("refused", kernel=OURS, reason=str(error))
        return f"no speeds, since our own kernel is wrong: {error}"
    except Lost as error:
        trouble = f"stopped early: {error}"
    print(journal.tables())
    return trouble


def machine(args: argparse.Namespace, setting: Setting) -> dict:
    """Who measures, with what, and what the machine does at best."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(setting.device),
        "driver": driver(),
        "versions": {name: installed(name) for name in PACKAGES} | {"CUDA": torch.version.cuda},
        "command": " ".join(["python benchmarks/kernel/speed.py", *public(sys.argv[1:], ("--out",))]),
        "dtype": args.dtype,
        "group_size": setting.group_size,
        "symmetric": setting.symmetric,
        "l2_bytes": setting.l2,
        "copied_bytes": gpu_limits.COPIED,
        "copy": setting.copy,
        "empty": gpu_limits.empty_microseconds(setting.device),
    }


def driver() -> str:
    """Version of the driver, highest clocks and power limit, as nvidia-smi tells them."""
    told = nvidia_smi("driver_version,clocks.max.sm,clocks.max.mem,power.limit")
    return "unknown, no nvidia-smi" if told is None else told


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--shapes", nargs="+", choices=NAMES, default=[], metavar="NAME", help="7b-down, 7b, down ...")
    made.add_argument("--tokens", nargs="+", type=positive, default=list(TOKENS), metavar="M")
    made.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    made.add_argument(
        "--int8-bits",
        nargs="*",
        type=int,
        choices=INT8_BITS,
        default=list(INT8_BITS),
        help="of weights for activations of 8 bits, default: all; without numbers: none",
    )
    made.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="default: all; without names: none")
    made.add_argument("--group-size", type=int, default=128)
    made.add_argument("--asymmetric", action="store_true", help="with zero points; of the peers only cuBLAS takes part")
    made.add_argument("--dtype", choices=DTYPES, default="bf16")
    made.add_argument("--seconds", type=float, default=540, help="after which no further case begins")
    made.add_argument("--peer-seconds", type=float, default=120, help="for packing, compiling and tuning of each peer")
    made.add_argument("--first-minute", action="store_true", help="copy bandwidth, empty kernel and cuBLAS only")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; tables beside it with the suffix .md")
    return made


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} tokens; at least 1 is needed")
    return int(text)


def main() -> None:
    args = parser().parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log would stand between the tables
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch finds no CUDA device, and nothing else can tell how fast these kernels are")
    device = f"cuda:{torch.cuda.current_device()}"
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    torch.manual_seed(args.seed)
    journal = Journal(args.out, report)
    if args.out:
        args.out.with_suffix(".md").unlink(missing_ok=True)  # should this run have no tables, an older one's go too
    # A graph cannot be captured on the default stream, and kernels keep a workspace for every stream: one for all.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        copy = gpu_limits.copy_bandwidth(device)
        setting = Setting(device, DTYPES[args.dtype], args.group_size, not args.asymmetric, l2, copy)
        journal.add("machine", **machine(args, setting))
        raise SystemExit(guarded(args, setting, journal))


if __name__ == "__main__":
    main()
