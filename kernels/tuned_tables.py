"""Reads and checks the tables of tiles and plans, one for each architecture: `tuned/ARCH.json`.

    origin           where the figures come from
    dequantise_from  number of tokens from which weights are dequantised for cuBLAS
    tiles            bits -> tokens up to which it is used (`BUCKETS`) -> fields of Tile
    measured         "bits group grid rows x columns bucket" (`key_of`) -> a plan that was the fastest for this shape

VLMQ_TUNED names a folder whose files come before ours. Architectures without a file take the one that is closest.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vlmq_vllm.kernels.hardware import Hardware
from vlmq_vllm.kernels.layout import FIELDS, Geometry

BUCKETS = (8, 16, 32, 64, 128)  # tokens up to which a tile is used; the last also above
TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Tile:
    """A program's part: `rows` of the weight for `tokens`; `scaled`: scales multiply the weight instead of the sums."""

    rows: int
    tokens: int
    warps: int
    stages: int
    scaled: bool = False


@dataclass(frozen=True)
class Plan:
    """A launch: its tile, and into how many parts the spans of K are divided."""

    tile: Tile
    splits: int = 1


def key_of(geometry: Geometry, bucket: int) -> str:
    grid = "symmetric" if geometry.format.symmetric else "asymmetric"
    return f"{geometry.bits} {geometry.format.group_size} {grid} {geometry.rows}x{geometry.columns} {bucket}"


@cache
def table_of(machine: Hardware) -> dict:
    """The tiles of an architecture; raises ValueError for a file that is not what it should be."""
    path = path_of(machine)
    try:
        table = json.loads(path.read_text())
        for bits in map(str, FIELDS):
            for bucket in map(str, BUCKETS):
                Tile(**table["tiles"][bits][bucket])
        for entry in table.get("measured", {}).values():
            Plan(Tile(**entry["tile"]), int(entry["splits"]))
        int(table["dequantise_from"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tiles ({error!r}); remove it, or tune anew") from None
    return table


def path_of(machine: Hardware) -> Path:
    """The file of an architecture, the user's before ours, or that of the one that comes closest."""
    folders = [Path(folder) for folder in (os.environ.get("VLMQ_TUNED"),) if folder] + [TUNED]
    name = f"{machine.arch}.json"
    return next((folder / name for folder in folders if (folder / name).is_file()), TUNED / f"{_like(machine)}.json")


def _like(machine: Hardware) -> str:
    if not machine.arch.startswith("sm_"):
        return "gfx942" if machine.arch.startswith("gfx") else "sm_90"
    if machine.shared < 128 << 10:
        return "sm_89"
    return "sm_80" if machine.shared < 200 << 10 else "sm_100"
