"""How much a layer's activations depend on those of the layer before: Q-VLM's proxy (2410.08119, equations 4 to 6).

X^(k) [N, C] is what layer k reads. Every element x is assigned softly to the M = 2^bits points q_m of its grid (eq. 5),

    p(q_m | x) = exp(-(x - q_m)^2 / Delta) / sum_m' exp(-(x - q_m')^2 / Delta),

which gives for matching elements of two consecutive layers a joint distribution and with it (eq. 4, in nats)

    D(k, k + 1) = -sum_ab p(a, b) log p(b | a),   p(a, b) = mean over elements of p(q_a | x^(k)) p(q_b | x^(k+1)).

What the paper leaves open:

* the unit of x: here one grid step, so that Delta is 1; in any other unit the softness would depend on the scale;
* the grid: M points over the range of the element's channel, as its language model's activations are quantised;
* the joint distribution: given the values, the two assignments are independent; all channels share one table;
* D(r, s) (eq. 6): the sum over the s - r pairs of neighbours in between; the printed sum goes one pair further.
"""

from collections.abc import Sequence

import torch

from vlmq_vllm.offline.ranks import Ranks

ELEMENTS = 1 << 20  # of each layer that are looked at, on each process
CHUNK = 1 << 22  # of soft assignments at once

Range = tuple[torch.Tensor, torch.Tensor]


def channel_ranges(batches: Sequence[torch.Tensor]) -> Range:
    """Least and greatest value [C] of each channel over tensors [..., C]."""
    lows, highs = zip(*(part.detach().flatten(0, -2).aminmax(dim=0) for part in batches), strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def soft_codes(x: torch.Tensor, bounds: Range, levels: int) -> torch.Tensor:
    """p(q_m | x) [..., C, M] for x [..., C]; differentiable in x. A constant channel lies on the first point."""
    low, high = bounds
    step = ((high - low) / (levels - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    distance = ((x - low) / step)[..., None] - torch.arange(levels, device=x.device)
    return torch.softmax(-distance.square(), -1)


def joint(ahead: torch.Tensor, behind: torch.Tensor, bounds: Range, bounds_behind: Range, levels: int) -> torch.Tensor:
    """Sum over the elements of x^(k) and x^(k+1) [N, C] of the outer products of their assignments, [M, M];
    differentiable."""
    size = max(1, CHUNK // (ahead.shape[-1] * levels))
    total = ahead.new_zeros(levels, levels)
    for a, b in zip(ahead.split(size), behind.split(size), strict=True):
        first = soft_codes(a, bounds, levels).flatten(0, -2)
        total = total + first.T @ soft_codes(b, bounds_behind, levels).flatten(0, -2)
    return total


def conditional_entropy(table: torch.Tensor) -> torch.Tensor:
    """H(b | a) in nats of a joint distribution [M, M], a along the rows; need not be normalised."""
    p = table / table.sum()
    rest = torch.special.entr(p).sum() - torch.special.entr(p.sum(1)).sum()
    return rest.clamp_min(0)


def sampled(hidden: torch.Tensor, stride: int) -> torch.Tensor:
    """Every `stride`-th token [N, C] float32 of hidden states [..., C], all of its channels."""
    return hidden.flatten(0, -2)[::stride].float()


def stride_of(batches: Sequence[torch.Tensor], elements: int = ELEMENTS) -> int:
    """The stride at which about `elements` elements of the batches are looked at."""
    return max(1, -(-sum(part.numel() for part in batches) // elements))


@torch.no_grad()
def dependency(
    ahead: Sequence[torch.Tensor],
    behind: Sequence[torch.Tensor],
    bits: int,
    ranks: Ranks,
    device: torch.device,
    elements: int = ELEMENTS,
) -> float:
    """D(k, k + 1) in nats, at least 0, from the batches' hidden states [..., C] in front of layers k and k + 1.

    Only the tables of the processes are exchanged; each takes the ranges of its own batches.
    """
    table = torch.zeros(1 << bits, 1 << bits, dtype=torch.float64, device=device)
    if ahead:
        stride = stride_of(ahead, elements)
        bounds, bounds_behind = channel_ranges(ahead), channel_ranges(behind)
        for a, b in zip(ahead, behind, strict=True):
            table += joint(sampled(a, stride), sampled(b, stride), bounds, bounds_behind, 1 << bits).double()
    return float(conditional_entropy(ranks.add(table)))
