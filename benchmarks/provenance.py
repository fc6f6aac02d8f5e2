"""Tells what machine made a result and by which command, for the head of the result."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str:
    """The package's version, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def nvidia_smi(query: str) -> str | None:
    """What nvidia-smi tells of these fields, the GPUs one after the other; None where it is not installed."""
    if not shutil.which("nvidia-smi"):
        return None
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return "; ".join((done.stdout or done.stderr).split("\n")).strip("; ")


def processor() -> str:
    """Name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def public(arguments: list[str], hidden: tuple[str, ...]) -> list[str]:
    """The command's arguments without the options `hidden`, which name folders of one machine, and their values."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not skip and name not in hidden:
            kept.append(argument)
        skip = not skip and name in hidden and not value
    return kept
