"""What a machine has installed, for the head of the benchmarks' results."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version


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
