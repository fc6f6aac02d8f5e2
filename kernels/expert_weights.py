"""The weights of all experts of a layer, stacked in the runtime layout: each expert's are a `layout.RuntimeWeight`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vlmq_vllm.kernels.layout import ACTIVATIONS, FLOATS, Geometry, RuntimeWeight, check_tensor


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Experts share sizes and format: the tensors of `RuntimeWeight`, stacked [experts, ...].

    Raises ValueError for tensors that do not fit each other.
    """

    geometry: Geometry
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError("there are no experts in packed")
        self[0]  # checks shapes, types and devices
        for name in ("packed", "scales", "zeros"):
            tensor = getattr(self, name)
            if tensor is not None and (len(tensor) != len(self) or not tensor.is_contiguous()):
                raise ValueError(f"{name} is of {len(tensor)} experts, packed of {len(self)}; all lie contiguously")

    @classmethod
    def stack(cls, weights: Iterable[RuntimeWeight], count: int) -> "ExpertWeights":
        """From the weights of `count` experts, not in memory together. Raises ValueError when they are not alike."""
        for i, weight in enumerate(weights):
            parts = (weight.packed, weight.scales, weight.zeros)
            if i == 0:
                geometry = weight.geometry
                stacked: list[Any] = [None if part is None else part.new_empty((count, *part.shape)) for part in parts]
            if weight.geometry != geometry:
                raise ValueError(f"expert {i} is {weight.geometry}, expert 0 {geometry}; they must be alike")
            for whole, part in zip(stacked, parts, strict=True):
                if whole is not None:
                    whole[i] = part
        return cls(geometry, *stacked)

    def __getitem__(self, expert: int) -> RuntimeWeight:
        zeros = None if self.zeros is None else self.zeros[expert]
        return RuntimeWeight(self.geometry, self.packed[expert], self.scales[expert], zeros)

    def __len__(self) -> int:
        return len(self.packed)

    def check_input(
        self, x: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None, router: torch.Tensor | None
    ) -> None:
        """Raises ValueError unless the arguments of `experts.multiply` fit."""
        columns, entries = self.geometry.columns, tuple(ids.shape)
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}; it must be int32 or int64 [tokens, experts each]")
        if tuple(x.shape) not in ((len(ids), columns), (*entries, columns)):
            raise ValueError(f"x has shape {list(x.shape)}; it must be {[len(ids), columns]} or {[*entries, columns]}")
        check_tensor("x", x, tuple(x.shape), ACTIVATIONS, self.packed, contiguous=False)
        if bias is not None:
            check_tensor("bias", bias, (len(self), self.geometry.rows), (x.dtype,), self.packed)
        if router is not None:
            check_tensor("router", router, entries, FLOATS, self.packed, contiguous=False)
