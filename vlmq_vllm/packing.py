"""A checkpoint's packing: turns the tensors in its files into those of `format.py`.

Checkpoints of other quantisers (`foreign/`) have other names and layouts, which their packing knows; it is plain data
that goes to vLLM's workers. Layers hold parameters under the names in the files, filled with what `unpack` gives.
"""

from dataclasses import dataclass

import torch

from vlmq_vllm.format import PARTS, WeightFormat


@dataclass(frozen=True)
class Packing:
    """What a packing offers; this one, of vlmq's own checkpoints, is that of `format.py`."""

    @property
    def parts(self) -> dict[str, str]:
        """Name of a tensor in the files -> part of `format.PARTS`; weight_packed's comes first."""
        return {part: part for part in PARTS}

    def shapes(self, module: str, format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes in the files of the tensors of `module`, a weight [rows, columns]."""
        return format.shapes(rows, columns)

    def unpack(
        self, module: str, name: str, tensor: torch.Tensor, format: WeightFormat, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """The tensor `name` of `module`, a weight of `shape` [O, I], as the part that it stands for; None for one that
        adds nothing to the format (zero points of a symmetric weight)."""
        return tensor


OWN = Packing()
