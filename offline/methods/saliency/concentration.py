"""Says how much of the whole weight few tokens hold: the median that bounds are relative to, and effective tokens.

Behind the layer where the first token of every chat becomes the attention sink, its gradient is a hundred times the
others': squared, it leaves a Hessian of as many tokens as there are chats. With g cut at C medians and lambda = g^p

    (sum lambda)^2 / sum lambda^2  >=  sum lambda / max lambda  >=  N / (2 C^p)

of N tokens count at least, for half of them have at least the median.
"""

from collections.abc import Sequence

import torch

from vlmq_vllm.offline.machine.ranks import Ranks

INFINITY = 0x7F800000  # the bits of the first float32 that is not finite


def pooled_median(norms: Sequence[torch.Tensor], ranks: Ranks) -> float:
    """The lower median of the positive values among all ranks' g [N] float32; 0 where none is positive.

    Positive floats are in the order of their bits read as integers: 31 halvings find the value itself, and cost a sum
    over ranks of one number each.
    """
    values = torch.cat(list(norms))
    bits = values[values > 0].view(torch.int32)

    def count(limit: int) -> int:
        return int(ranks.add((bits <= limit).sum()))

    half = (count(INFINITY) + 1) // 2
    low, high = 0, INFINITY
    while half and low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= half else (middle + 1, high)
    return torch.tensor(low, dtype=torch.int32).view(torch.float32).item()


def pooled_mean(values: Sequence[torch.Tensor], ranks: Ranks) -> float:
    """The mean over all ranks' values [N], summed in float64."""
    pooled = torch.cat(list(values)).double()
    total, count = ranks.add(torch.stack([pooled.sum(), torch.tensor(float(len(pooled))).to(pooled)])).tolist()
    return total / count


def effective_tokens(weights: Sequence[torch.Tensor], ranks: Ranks) -> float:
    """(sum lambda)^2 / sum lambda^2 over all ranks' token weights [N] (Kish's effective sample size): the number of
    tokens where all count alike, 1 where one has the whole weight."""
    pooled = torch.cat(list(weights)).double()
    total, squares = ranks.add(torch.stack([pooled.sum(), pooled.square().sum()])).tolist()
    return total**2 / squares if squares else 0.0
