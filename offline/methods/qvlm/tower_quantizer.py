"""Quantises the vision tower with Q-VLM: learns the clipping bounds of all its weights together (`bounds.py`).

All blocks are learnt at once from the full-precision model, before the first is written, and the learning is
deterministic: a run that goes on where it was stopped learns the same bounds again.
"""

from collections.abc import Sequence

import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.grid import MSE, GridSearch
from vlmq_vllm.offline.methods.qvlm.bounds import Clipped, Hyperparameters, clip_groups, learn_bounds, teaches
from vlmq_vllm.offline.methods.qvlm.ranges import FormatOf, Ranges, Tensors, files_and_rows, ranges_in
from vlmq_vllm.offline.methods.solution import Row
from vlmq_vllm.offline.model.layers import linear_of
from vlmq_vllm.offline.model.source import Source


class TowerQuantizer:
    """A tower whose blocks have the in-memory names `names`.

    batches, labels: as in `learn_bounds`; of several processes the first that has pictures learns, from its own share,
    and the others take over what it found. Raises QuantizeError where none has.
    """

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        format_of: FormatOf,
        device: torch.device,
        ranks: Ranks,
        batches: list[dict],
        labels: list[torch.Tensor],
        grid: GridSearch = MSE,
        hyper: Hyperparameters | None = None,
    ) -> None:
        self.source, self.device = source, device
        self.ranges: dict[str, dict[str, Ranges]] = {}
        clipped: dict[str, Clipped] = {}
        for name in names:
            with source.loaded(name, device) as block:
                self.ranges[name] = ranges_in(source, name, block, format_of, grid)
                for linear, ranges in self.ranges[name].items():
                    clipped[f"{name}.{linear}"] = clip_groups(linear_of(block, linear).weight.detach(), ranges)
        able = any(teaches(*pair) for pair in zip(batches, labels, strict=True))
        learner = ranks.first(ranks.rank if able else None)
        if learner in (None, ranks.rank):  # where nobody is able, all are told
            learn_bounds(source, batches, labels, clipped, device, hyper or Hyperparameters())
        self.factors = {name: own.factors[0].detach() for name, own in clipped.items()}
        for factor in self.factors.values():
            ranks.broadcast(factor, learner)

    @torch.no_grad()
    def layer(self, name: str, index: int, last: bool = False) -> tuple[Tensors, list[Row]]:
        """Block `name`: tensors by their names in the files, and report rows."""
        with self.source.loaded(name, self.device) as block:
            rounded = {
                linear: ranges.rounded(linear_of(block, linear).weight, self.factors[f"{name}.{linear}"])
                for linear, ranges in self.ranges[name].items()
            }
        return files_and_rows(self.source, name, rounded)

    def replay(self, name: str, index: int) -> None:
        """Nothing moves: the bounds were learnt together."""
