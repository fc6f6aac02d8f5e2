"""Shares one quantisation among processes (`torchrun -m vlmq_vllm.offline quantize ...`).

Samples are split over them, Hessians are summed, and the solving is shared out.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vlmq_vllm.errors import QuantizeError

# One process may learn or solve for hours while the others wait (the library's own limit is 10 minutes on GPUs); where
# one fails, torchrun ends them all.
PATIENCE = timedelta(days=7)


class Ranks:
    """This process's place among `size`; started by torchrun or alone."""

    def __init__(self, device: torch.device) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        self.rank = dist.get_rank() if self.size > 1 else 0

    def own(self, items: list) -> list:
        """This rank's share of `items`. Raises QuantizeError when there are fewer than ranks."""
        if len(items) < self.size:
            raise QuantizeError(f"{len(items)} batches cannot be split over {self.size} processes; start fewer")
        return items[self.rank :: self.size]

    def owner(self, number: int) -> int:
        return number % self.size

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce(self, tensor: torch.Tensor, owner: int) -> None:
        """The sum over ranks, in place, on rank `owner`; the others' tensors are undefined afterwards."""
        if self.size > 1:
            dist.reduce(tensor, owner)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def first(self, found: Any) -> Any:
        """The first value in the order of ranks that is not None, on every rank."""
        if self.size == 1:
            return found
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, found)
        return next((one for one in everyone if one is not None), None)

    def any(self, flag: bool) -> bool:
        return bool(self.first(True if flag else None))

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()
