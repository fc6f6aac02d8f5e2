"""A checkpoint's packing: turns the tensors in its files into those of `format.py`.

Our own checkpoints need nothing done. Those of other quantisers (`foreign/`) have other names and layouts, and their
packing knows them; it is plain data that goes to vLLM's workers with the configuration. Layers hold parameters under
the names in the files, filled with what `unpack` gives (`serving/container.py`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from vlmq_vllm.format import PARTS, WeightFormat


class Packing(Protocol):
    """What a packing offers."""

    @property
    def parts(self) -> dict[str, str]:
        """Name of a tensor in the files -> part of `format.PARTS`; weight_packed's comes first."""

    def shapes(self, module: str, format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes in the files of the tensors of `module`, a weight [rows, columns]."""

    def unpack(
        self, module: str, name: str, tensor: torch.Tensor, format: WeightFormat, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """The tensor `name` of `module`, a weight of `shape` [O, I], as the part that it stands for; None for one that
        adds nothing to the format (zero points of a symmetric weight)."""


@dataclass(frozen=True)
class OwnPacking:
    """The packing of vlmq's checkpoints, which is that of `format.py`."""

    @property
    def parts(self) -> dict[str, str]:
        return {part: part for part in PARTS}

    def shapes(self, module: str, format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return format.shapes(rows, columns)

    def unpack(
        self, module: str, name: str, tensor: torch.Tensor, format: WeightFormat, shape: tuple[int, int]
    ) -> torch.Tensor:
        return tensor


OWN = OwnPacking()
