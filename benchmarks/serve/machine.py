"""Describes the machine and the load for the head of the serve benchmark's results, without this machine's folders."""

import datetime
import os
import shlex
import sys
from pathlib import Path

from benchmarks.provenance import installed, nvidia_smi, processor, public
from benchmarks.serve.variants import Load
from vlmq_vllm.format import WeightFormat

ROOT = Path(__file__).absolute().parents[2]
PACKAGES = ("vllm", "torch", "humming-kernels", "vlmq-vllm")
HIDDEN = ("--out", "--work", "--model")  # options that name folders


def machine(
    model: Path | None, shape: str | None, layers: int | None, format: WeightFormat, load: Load, gpu: bool
) -> dict:
    """Fields of the line of kind "machine"."""
    if model:
        served = f"the model {model.relative_to(ROOT) if model.is_relative_to(ROOT) else model.name}"
    else:
        served = f"random weights of {shape}'s shape" + (f", {layers} decoder layers" if layers else "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "device": graphics_card() if gpu else f"{processor()}, {len(os.sched_getaffinity(0))} cores; no GPU",
        "versions": {name: installed(name) for name in PACKAGES},
        "command": shlex.join(["python", "benchmarks/serve/throughput.py", *public(sys.argv[1:], HIDDEN)]),
        "model": served,
        "load": _told(load, format),
    }


def without_folders(text: str, work: Path) -> str:
    """One line that names no folder of this machine."""
    for folder, name in ((work, "WORK"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return " ".join(text.split())[:300]


def graphics_card() -> str:
    """Name, version of the driver, highest clocks and power limit, as nvidia-smi tells them."""
    told = nvidia_smi("name,driver_version,clocks.max.sm,clocks.max.mem,power.limit")
    return "a GPU of unknown name, no nvidia-smi" if told is None else told


def _told(load: Load, format: WeightFormat) -> str:
    width, height = load.image
    rate = "" if load.rate == float("inf") else f", {load.rate} per second"
    return (
        f"{load.requests} requests a run, at most {load.concurrency or load.requests} at once{rate}; "
        f"each {load.input_tokens} tokens of text, a picture of {width} x {height} pixels and "
        f"{load.output_tokens} tokens of answer. Groups of {format.group_size}, "
        f"{'symmetric' if format.symmetric else 'with zero points'}."
    )
