"""Where the scripts of `benchmarks/` lie, and a machine that their results might tell of."""

from pathlib import Path

FOLDER = str(Path(__file__).absolute().parents[2] / "benchmarks")
# A line of kind "machine" without its kind.
MACHINE = {
    "date": "2026-11-21T10:00:00+00:00",
    "device": "A card",
    "driver": "580.1",
    "versions": {"torch": "2.11.0", "vllm": "not installed"},
    "command": "python benchmarks/kernel/speed.py --bits 4",
    "dtype": "bf16",
    "group_size": 128,
    "symmetric": True,
    "copied_bytes": 1 << 30,
    "copy": 4000.0,
    "empty": 1.25,
}
