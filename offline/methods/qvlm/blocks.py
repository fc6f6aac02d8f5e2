"""Blocks of a stack: the entropies that part it into blocks, and the search of one block's choices.

Both streams are needed: U behind the quantised layers, F behind the full-precision ones. The error of a layer or a
block is the mean over all elements of

    | block_q(U) - block_r(F) |^2,

as W_q X_q - W_r X_r in equations 2 and 3 of Q-VLM (2410.08119), where each weight has its own activations. What the
candidates are, and how a layer is run with one, the layers know that are handed in.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.qvlm.entropy import neighbour_entropy
from vlmq_vllm.offline.methods.qvlm.search import Choice, search
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

Hidden = list[torch.Tensor]


class Searched(Protocol):
    """A layer in a block that is being searched."""

    def targets(self) -> Hidden:
        """What the full-precision layer passes on, per batch; the full-precision streams move behind it."""

    def hold(self, choice: int) -> None:
        """Run with this candidate from now on."""

    def run(self, state: Hidden) -> Hidden:
        """The hidden states behind the layer for those in front of it, per batch."""


@torch.no_grad()
def measure(
    source: Source, names: Sequence[str], full: list[Stream], bits: int, ranks: Ranks, device: torch.device
) -> list[float]:
    """D(k, k + 1) in nats of all neighbours among the layers `names`, from one pass over copies of the streams."""
    streams, found = [replace(stream) for stream in full], []
    for k, name in enumerate(names[:-1]):
        layer = source.materialise(name, device)
        ahead = [stream.hidden for stream in streams]
        for stream in streams:
            stream.hidden = stream.run(layer, k)
        source.release(name)
        found.append(neighbour_entropy(ahead, [stream.hidden for stream in streams], bits, ranks, device))
    return found


def search_block(
    layers: Sequence[Searched], start: Hidden, candidates: int, ranks: Ranks, device: torch.device
) -> Choice:
    """The candidates of a block's layers, for the quantised hidden states `start` in front of it. The full-precision
    streams move behind the block."""
    targets = [layer.targets() for layer in layers]

    def step(k: int, choice: int, state: Hidden) -> Hidden:
        layers[k].hold(choice)
        return layers[k].run(state)

    def error(k: int, state: Hidden) -> float:
        return mean_square(state, targets[k], ranks, device)

    return search(len(layers), candidates, start, step, error)


def mean_square(state: Hidden, targets: Hidden, ranks: Ranks, device: torch.device) -> float:
    """Mean squared difference over all elements of all batches on all processes."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for found, wanted in zip(state, targets, strict=True):
        sums += torch.stack([(found - wanted).square().sum().double(), sums.new_tensor(float(wanted.numel()))])
    total, count = ranks.add(sums).tolist()
    return total / max(count, 1.0)
