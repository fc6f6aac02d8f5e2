"""Keeps every linear of a study, at every width and by every method, on disk.

One file per method, width and unit, `METHOD-BITS/UNIT.safetensors`, written aside, read back and renamed, so that it is
there whole or not at all. A linear is there with the tensors of a checkpoint (`format.PARTS`) by its name in the files;
where its columns were scaled (AWQ), as the weight [O, I] that codes, scales and channel scales amount to, in 16 bits.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.offline.checkpoint.atomic import aside, check_written
from vlmq_vllm.offline.model.targets import Target, Unit

Kind = tuple[str, int]  # method, width


class Pieces:
    """The files under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, kind: Kind, unit: Unit) -> Path:
        method, bits = kind
        return self.folder / f"{method}-{bits}" / f"{unit.key}.safetensors"

    def write(self, kind: Kind, unit: Unit, weights: dict[str, QuantizedWeight | torch.Tensor]) -> None:
        """Keep a unit's linears, by their names in the files."""
        path = self.file(kind, unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            parts = {"weight": weight} if isinstance(weight, torch.Tensor) else weight.tensors()
            tensors |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
        with aside(path) as partial:
            save_file(tensors, partial)
            check_written(partial, tensors)

    def drop_damaged(self) -> list[Path]:
        """Remove files that are cut short or no safetensors files, so that they are made again; returns their paths."""
        damaged = [path for path in sorted(self.folder.glob("*/*.safetensors")) if not _opens(path)]
        for path in damaged:
            path.unlink()
        return damaged

    def read(self, kind: Kind, unit: Unit, target: Target) -> torch.Tensor:
        """The weight [O, I] of a linear as it would be served, in the 16-bit dtype of its scales."""
        with safe_open(self.file(kind, unit), "pt") as file:
            names = set(file.keys())
            if f"{target.module}.weight" in names:
                return file.get_tensor(f"{target.module}.weight")
            found = {part: file.get_tensor(name) for part in PARTS if (name := f"{target.module}.{part}") in names}
        weight = QuantizedWeight.from_tensors(replace(target.format, bits=kind[1]), found)
        return weight.dequantize(weight.scale.dtype)


def _opens(path: Path) -> bool:
    """Whether the header is sound and covers the whole file."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False
