"""Quantises the vision tower with Q-VLM: learns the clipping bounds of all its weights together (`bounds.py`).

All blocks are learnt at once from the full-precision model, before the first is written, and the learning is
deterministic: a run that goes on where it was stopped learns the same bounds again.
"""

from collections.abc import Callable, Sequence

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.grid import MSE, GridSearch
from vlmq_vllm.offline.methods.qvlm.bounds import (
    DEFAULT,
    UNTAUGHT,
    Clipped,
    Hyperparameters,
    clip_groups,
    learn_bounds,
    teaches,
)
from vlmq_vllm.offline.methods.qvlm.ranges import Ranges, find_ranges
from vlmq_vllm.offline.methods.solution import Row
from vlmq_vllm.offline.model.layers import weights_of
from vlmq_vllm.offline.model.source import Source


class TowerQuantizer:
    """A tower whose blocks have the in-memory names `names`; `losses` are those of each epoch.

    format_of: as in BlockQuantizer. batches, labels: as in `learn_bounds`; of several processes the first that has
    pictures learns, from its own share, and the others take over what it found.
    """

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        format_of: Callable[[str], WeightFormat | None],
        device: torch.device,
        ranks: Ranks,
        batches: list[dict],
        labels: list[torch.Tensor],
        grid: GridSearch = MSE,
        hyper: Hyperparameters = DEFAULT,
    ) -> None:
        self.source, self.device = source, device
        self.ranges: dict[str, Ranges] = {}
        clipped: dict[str, Clipped] = {}
        for name in names:
            block = source.materialise(name, device)
            for linear, weight in weights_of(block).items():
                full = f"{name}.{linear}"
                if (format := format_of(full)) is not None:
                    self.ranges[full] = find_ranges(weight, format, source.stored_dtype(f"{full}.weight"), grid)
                    clipped[full] = clip_groups(weight.detach(), self.ranges[full])
            source.release(name)
        able = any(teaches(*pair) for pair in zip(batches, labels, strict=True))
        learner = ranks.first(ranks.rank if able else None)
        if learner is None:
            raise QuantizeError(UNTAUGHT)
        self.losses = learn_bounds(source, batches, labels, clipped, device, hyper) if ranks.rank == learner else []
        self.factors = {name: own.factors[0].detach() for name, own in clipped.items()}
        for factor in self.factors.values():
            ranks.broadcast(factor, learner)

    @torch.no_grad()
    def layer(self, name: str, index: int, last: bool = False) -> tuple[dict[str, torch.Tensor], list[Row]]:
        """Block `name`: tensors by their names in the files, and report rows."""
        block = self.source.materialise(name, self.device)
        tensors: dict[str, torch.Tensor] = {}
        rows = []
        for linear, weight in weights_of(block).items():
            full = f"{name}.{linear}"
            if full in self.ranges:
                module = self.source.module_in_files(full)
                rounded = self.ranges[full].rounded(weight, self.factors[full])
                tensors |= {f"{module}.{part}": tensor for part, tensor in rounded.tensors().items()}
                rows.append(Row(module, None, None, 0, "equal", None))
        self.source.release(name)
        return tensors, rows

    def replay(self, name: str, index: int) -> None:
        """Nothing moves: the bounds were learnt together."""
