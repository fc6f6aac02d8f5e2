"""Cuts what one rank holds of a layer out of the checkpoint's tensors: a segment of every module of the layer.

Tensors are cut as they arrive, after the checkpoint's packing has turned them into those of `format.py`. Segments of a
fused layer may differ in width, grouping and grid; one that the checkpoint keeps at 16 bits has no format and a dense
`weight`. Of a weight [O, I] a rank has

    rows     ranges of O in the order of the layer's outputs, then `padding` rows that evaluate to zero
    columns  one range of I, which begins on a 32-bit word; a group that lies on two ranks gives both its scale
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.format import WORD, WeightFormat, pack, unpack
from vlmq_vllm.packing import OWN, Packing

Layer = Any  # a layer that vLLM built: a torch.nn.Module with attributes of vLLM's, whose types are not known here
DENSE = "weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = {DENSE: FLOATS, "weight_scale": FLOATS, "weight_shape": (torch.int64, torch.int32)}  # others: int32


@dataclass(frozen=True)
class Segment:
    """The part of checkpoint module `name` that one rank holds; see above.

    `layer` is its layer in vLLM, which builds the whole weight in the shape `disk` = [O, I]; `info` what the headers
    say of it, None for a weight at 16 bits. Raises ValueError, naming layer and module, for another shape, and with the
    tensor-parallel sizes that work for columns that cannot be cut out.
    """

    layer: str
    name: str
    info: ModuleInfo | None
    disk: tuple[int, int]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    padding: int = 0
    packing: Packing = OWN

    def __post_init__(self) -> None:
        if self.info is None:
            return
        if (self.info.rows, self.info.columns) != self.disk:
            raise ValueError(
                f"{self.layer}: {self.name} is {self.info.rows} x {self.info.columns} in the checkpoint, but vLLM "
                f"builds it {self.disk[0]} x {self.disk[1]}; the checkpoint does not belong to this config.json, or "
                "vLLM changes this layer's size, then quantise without it"
            )
        if self.format is None:
            stored, total, count = self.info.format, self.disk[1], self.shape[1]
            fitting = [n for n in range(1, 65) if total % n == 0 and stored.part(total, total // n)]
            raise ValueError(
                f"{self.layer}: {total} inputs in groups of {stored.group_size} at {stored.bits} bits cannot be cut "
                f"into {total // count} parts of {count}; serve with --tensor-parallel-size "
                f"{' or '.join(map(str, fitting))}, or quantise with smaller groups"
            )

    @cached_property
    def format(self) -> WeightFormat | None:
        """The format of the part; None for a weight at 16 bits."""
        return None if self.info is None else self.info.format.part(self.disk[1], self.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return sum(stop - start for start, stop in self.rows) + self.padding, self.columns[1] - self.columns[0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape on this rank of every tensor of the segment, by part name."""
        rows, columns = self.shape
        return {DENSE: (rows, columns)} if self.format is None else self.format.shapes(rows, columns)

    def parts(self) -> dict[str, str]:
        """Name in the files of every tensor of the segment -> the part of `shapes` that it becomes; a name whose part
        is not among `shapes` stands for a tensor of which nothing is kept."""
        if self.info is None:
            return {DENSE: DENSE}
        names = self.packing.shapes(self.name, self.info.format, *self.disk)
        return {name: part for name, part in self.packing.parts.items() if name in names}

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """This rank's piece of the tensor `name` of the files, None if nothing of it is kept. Raises ValueError."""
        self._check(name, tensor)
        part = self.parts()[name]
        found: torch.Tensor | None = tensor
        if self.info is not None:
            found = self.packing.unpack(self.name, name, tensor, self.info.format, self.disk)
        if found is None or part == "weight_shape":
            return found
        if part == "weight_zero_point":
            return self._cut_zeros(found)
        return self._cut_rows(found)[:, self._columns_of(part)]

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        part, where = self.parts().get(name), f"{self.name}.{name}"
        if part is None:
            raise ValueError(f"{where} was found, but {self.name} has no such tensor by config.json; export it again")
        expected: tuple[int, ...] = self.disk
        if self.info is not None:
            expected = self.packing.shapes(self.name, self.info.format, *self.disk)[name]
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{where} has shape {list(tensor.shape)}, expected {list(expected)}; the checkpoint is damaged or "
                "was changed after the server read its headers, copy it again"
            )
        allowed = DTYPES.get(part, (torch.int32,))
        if tensor.dtype not in allowed:
            raise ValueError(f"{where} is {tensor.dtype}, expected {allowed[0]}; export the checkpoint again")
        if part == "weight_shape" and tuple(tensor.tolist()) != self.disk:
            raise ValueError(f"{where} says {tensor.tolist()}, expected {list(self.disk)}; copy the checkpoint again")

    def _cut_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.rows == ((0, tensor.shape[0]),) and not self.padding:
            return tensor
        pieces = [tensor[start:stop] for start, stop in self.rows]
        return torch.cat([*pieces, tensor.new_zeros(self.padding, tensor.shape[1])])

    def _cut_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        """Zero points are packed along the rows, whose ranges need not fall on words: unpack, cut and pack."""
        assert self.format is not None, "a weight at 16 bits has no zero points"
        zeros = unpack(packed.T, self.format.bits, self.disk[0]).T
        zeros = self._cut_rows(zeros)[:, self._columns_of("weight_zero_point")]
        return pack(zeros.T, self.format.bits).T

    def _columns_of(self, part: str) -> slice | torch.Tensor:
        """Which of a part's second dimension, weights, words or groups, belong to the columns."""
        start, stop = self.columns
        if part == DENSE:
            return slice(start, stop)
        assert self.info is not None and self.format is not None
        if part == "weight_packed":
            return slice(start * self.format.bits // WORD, -(-stop * self.format.bits // WORD))
        count = stop - start
        firsts = start + torch.arange(self.format.groups(count)) * self.format.width(count)
        return firsts // self.info.format.width(self.disk[1])
