"""Splits a stack of layers into blocks, and searches one block's candidates together (Q-VLM, 2410.08119).

Layers r to s form a block if the entropies D between neighbours (`entropy.py`) are on average above the threshold h0,

    D(r, s) = sum_{k=r}^{s-1} D(k, k + 1) > (s - r) h0,                                                 equation 7

and are at most `depth` (the paper: 3). What the paper leaves open: the scan goes from the first layer to the last
without overlap, and each block takes the longest run that qualifies; h0 is the median of all D(k, k + 1), so that it
needs no tuning and about half of the pairs lie above it. A layer that qualifies with none is a block by itself.

The rule is the printed one, and it contradicts its reason: the paper wants layers together that depend on each other,
but D is a conditional entropy, which is large for neighbours that depend on each other little. What speaks for large D
is a measurement of the paper's: it grows with what the joint search gains over the layer-wise one.

The search needs both streams: U after the quantised layers, F after the full-precision ones. The error of a layer or a
block is the mean over all elements of

    | block_q(U) - block_r(F) |^2,

as W_q X_q - W_r X_r in equations 2 and 3, where each weight has its own activations. What the candidates are, and how a
layer is run with one, is up to the layers that are handed in.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.qvlm.entropy import neighbour_entropy
from vlmq_vllm.offline.methods.qvlm.search import BlockChoice, search
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

DEPTH = 3  # layers of a block at most
Hidden = list[torch.Tensor]  # hidden states, one tensor per batch


class SearchedLayer(Protocol):
    """A layer of a block that is being searched."""

    def full_outputs(self) -> Hidden:
        """The full-precision layer's output; the full-precision streams move past it."""

    def hold(self, candidate: int) -> None:
        """Run with this candidate from now on."""

    def run(self, state: Hidden) -> Hidden:
        """The layer's output for the input `state`."""


def find_blocks(entropies: Sequence[float], depth: int = DEPTH, threshold: float | None = None) -> list[range]:
    """The blocks of len(entropies) + 1 layers, in order; entropies[k] is D(k, k + 1) in nats.

    threshold: h0 in nats, None for the median. Raises QuantizeError for a depth below 1.
    """
    if depth < 1:
        raise QuantizeError(
            f"a block of {depth} layers cannot be searched; give a depth of at least 1 (usual: {DEPTH})"
        )
    if threshold is None:
        threshold = statistics.median(entropies) if entropies else 0.0
    count = len(entropies) + 1
    blocks: list[range] = []
    while (first := blocks[-1].stop if blocks else 0) < count:
        lasts = range(min(first + depth, count) - 1, first, -1)
        last = next((s for s in lasts if sum(entropies[first:s]) > (s - first) * threshold), first)
        blocks.append(range(first, last + 1))
    return blocks


@torch.no_grad()
def measure_entropies(
    source: Source, names: Sequence[str], full: list[Stream], bits: int, ranks: Ranks, device: torch.device
) -> list[float]:
    """D(k, k + 1) in nats of all neighbours among the layers `names`, from one pass over copies of the streams."""
    streams, found = [replace(stream) for stream in full], []
    for k, name in enumerate(names[:-1]):
        layer = source.materialise(name, device)
        before = [stream.hidden for stream in streams]
        for stream in streams:
            stream.hidden = stream.run(layer, k)
        source.release(name)
        found.append(neighbour_entropy(before, [stream.hidden for stream in streams], bits, ranks, device))
    return found


def search_block(
    layers: Sequence[SearchedLayer], start: Hidden, candidates: int, ranks: Ranks, device: torch.device
) -> BlockChoice:
    """The candidates of a block's layers, for its input `start` from the quantised layers before it. The full-precision
    streams move past the block."""
    targets = [layer.full_outputs() for layer in layers]

    def step(k: int, candidate: int, state: Hidden) -> Hidden:
        layers[k].hold(candidate)
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
