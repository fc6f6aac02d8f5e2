"""Finds how Q-VLM rounds the vision tower: the clipping bounds of all its weights are learnt together (`bounds.py`).

All blocks are learnt at once, before the first is written; a run that goes on where it was stopped learns the same
bounds again.
"""

from collections.abc import Callable, Sequence

import torch

from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.grid import MSE, GridSearch
from vlmq_vllm.offline.methods.qvlm.bounds import Clipped, Hyperparameters, clip_groups, learn_bounds, teaches
from vlmq_vllm.offline.methods.qvlm.ranges import FormatOf, Ranges, ranges_in
from vlmq_vllm.offline.model.layers import linear_of
from vlmq_vllm.offline.model.source import Source


def learn_tower(
    source: Source,
    names: Sequence[str],
    format_of: FormatOf,
    device: torch.device,
    ranks: Ranks,
    batches: list[dict],
    labels: list[torch.Tensor],
    grid: GridSearch = MSE,
    hyper: Hyperparameters | None = None,
) -> Callable[[str, torch.Tensor], QuantizedWeight]:
    """How weights [O, I] float32 of a tower's linears (by in-memory name) are rounded; its blocks are `names`.

    batches, labels: as in `learn_bounds`; of several processes the first that has pictures learns, from its own share,
    and the others take over what it found. Raises QuantizeError where none has.
    """
    ranges: dict[str, Ranges] = {}
    clipped: dict[str, Clipped] = {}
    for name in names:
        with source.loaded(name, device) as block:
            for linear, found in ranges_in(source, name, block, format_of, grid).items():
                ranges[f"{name}.{linear}"] = found
                clipped[f"{name}.{linear}"] = clip_groups(linear_of(block, linear).weight.detach(), found)
    able = any(teaches(*pair) for pair in zip(batches, labels, strict=True))
    learner = ranks.first(ranks.rank if able else None)
    if learner in (None, ranks.rank):  # where nobody is able, all are told
        learn_bounds(source, batches, labels, clipped, device, hyper or Hyperparameters())
    factors = {name: own.factors[0].detach() for name, own in clipped.items()}
    for factor in factors.values():
        ranks.broadcast(factor, learner)
    return lambda name, weight: ranges[name].rounded(weight, factors[name])
