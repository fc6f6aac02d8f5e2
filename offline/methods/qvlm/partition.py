"""Which layers are searched together: Q-VLM's blocks (2410.08119, equation 7).

Layers r to s form a block if the entropies D between neighbours (`entropy.py`) are on average above the threshold h0,

    D(r, s) = sum_{k=r}^{s-1} D(k, k + 1) > (s - r) h0,

and are at most `depth` (the paper: 3). What the paper leaves open: the scan goes from the first layer to the last
without overlap, and each block takes the longest run that qualifies; h0 is the median of all D(k, k + 1), so that it
needs no tuning and about half of the pairs lie above it. A layer that qualifies with none is a block by itself.

The rule is the printed one, and it contradicts its reason: the paper wants layers together that depend on each other,
but D is a conditional entropy, which is large for neighbours that depend on each other little. What speaks for large D
is a measurement of the paper's: it grows with what the joint search gains over the layer-wise one.
"""

import statistics
from collections.abc import Sequence

from vlmq_vllm.errors import QuantizeError

DEPTH = 3


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
    count, blocks = len(entropies) + 1, []
    while (first := blocks[-1].stop if blocks else 0) < count:
        lasts = range(min(first + depth, count) - 1, first, -1)
        last = next((s for s in lasts if sum(entropies[first:s]) > (s - first) * threshold), first)
        blocks.append(range(first, last + 1))
    return blocks
