"""Splits a stack of layers into blocks, and searches one block's candidates together (Q-VLM, 2410.08119).

Layers r to s form a block if the entropies D between neighbours (`entropy.py`) are on average above the threshold h0,

    D(r, s) = sum_{k=r}^{s-1} D(k, k + 1) > (s - r) h0,                                                 equation 7

and are at most `depth` (the paper: 3). What the paper leaves open: the scan goes from the first layer to the last
without overlap, and each block takes the longest run that qualifies, or is a single layer; h0 is the median of all
D(k, k + 1).

The rule is the printed one, though D, a conditional entropy, is large for neighbours that depend on each other little,
and the paper wants those together that depend much: it measures that D grows with what the joint search gains.

The search needs both streams: U after the quantised layers, F after the full-precision ones. The error of a layer or a
block is the mean over all elements of

    | block_q(U) - block_r(F) |^2,

as W_q X_q - W_r X_r in equations 2 and 3, where each weight has its own activations. Greedy (eq. 2) gives each layer
the candidate with the least error at its own output, after the layers that have chosen before it. Joint (eq. 3) looks
at the output of the block's last layer alone. How its space is searched the paper does not say; here it is coordinate
descent that starts from the greedy choice and takes a change only if it lowers the block's error.
"""

import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.qvlm.entropy import neighbour_entropy
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

DEPTH = 3  # layers of a block at most
SWEEPS = 3  # over the layers of a block; later ones change next to nothing
Hidden = list[torch.Tensor]  # hidden states, one tensor per batch


class SearchedLayer(Protocol):
    """A layer of a block that is being searched."""

    def full_outputs(self) -> Hidden:
        """The full-precision layer's output; the full-precision streams move past it."""

    def hold(self, candidate: int) -> None:
        """Run with this candidate from now on."""

    def run(self, state: Hidden) -> Hidden:
        """The layer's output for the input `state`."""


@dataclass(frozen=True)
class BlockChoice:
    """Candidates of a block's layers, by number, and the error at its output: jointly searched, and by greedy alone."""

    joint: tuple[int, ...]
    error: float
    greedy: tuple[int, ...]
    greedy_error: float


def find_blocks(entropies: Sequence[float], depth: int = DEPTH, threshold: float | None = None) -> list[range]:
    """The blocks of len(entropies) + 1 layers, in order; entropies[k] is D(k, k + 1) in nats.

    threshold: h0 in nats, None for the median.
    """
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
        before = [stream.hidden for stream in streams]
        with source.loaded(name, device) as layer:
            for stream in streams:
                stream.hidden = stream.run(layer, k)
        found.append(neighbour_entropy(before, [stream.hidden for stream in streams], bits, ranks, device))
    return found


def search_block(
    layers: Sequence[SearchedLayer], start: Hidden, candidates: int, ranks: Ranks, device: torch.device
) -> BlockChoice:
    """Choose for a block's layers among `candidates` each, by number; of equal ones the first. start: the block's input
    from the quantised layers before it. The full-precision streams move past the block."""
    targets = [layer.full_outputs() for layer in layers]
    states, chosen, least = [start], [], 0.0
    for layer, target in zip(layers, targets, strict=True):
        tried = []
        for c in range(candidates):
            layer.hold(c)
            state = layer.run(states[-1])
            tried.append(mean_square(state, target, ranks, device))
            if tried.index(min(tried)) == c:
                best, choice = state, c
        states.append(best)
        chosen.append(choice)
        least = min(tried)
    greedy, greedy_error = tuple(chosen), least
    for _ in range(SWEEPS if len(layers) > 1 else 0):
        before = least
        for k in range(len(layers)):
            old = chosen[k]
            for c in range(candidates):
                if c == old:
                    continue
                trial = [*chosen[:k], c, *chosen[k + 1 :]]
                end = deque(_outputs(layers, trial, k, states[k]), maxlen=1)[0]
                found = mean_square(end, targets[-1], ranks, device)
                if found < least:
                    least, chosen = found, trial
            if chosen[k] != old:
                states[k + 1 :] = _outputs(layers, chosen, k, states[k])
        if least == before:
            break
    return BlockChoice(tuple(chosen), least, greedy, greedy_error)


def _outputs(layers: Sequence[SearchedLayer], choices: list[int], first: int, state: Hidden) -> Iterator[Hidden]:
    """The outputs of layers `first` and later, for the input `state` of the first."""
    for layer, choice in zip(layers[first:], choices[first:], strict=True):
        layer.hold(choice)
        state = layer.run(state)
        yield state


def mean_square(state: Hidden, targets: Hidden, ranks: Ranks, device: torch.device) -> float:
    """Mean squared difference over all elements of all batches on all processes."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for found, wanted in zip(state, targets, strict=True):
        sums += torch.stack([(found - wanted).square().sum().double(), sums.new_tensor(float(wanted.numel()))])
    total, count = ranks.add(sums).tolist()
    return total / max(count, 1.0)
