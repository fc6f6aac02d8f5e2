"""Rounds values to uniform points in floating point: what Q-VLM's tables of W4A4, W6A6 and W8A8 need.

A value x is cut to [low, high] and takes the nearest of M = 2^bits points, step = (high - low) / (M - 1):

    fake(x) = low + step * round((clip(x, low, high) - low) / step)

The rounding itself has the gradient 1 (straight through), so that d fake / d high is 1 for a value that is cut at the
top, 0 for one cut at the bottom, and (round(t) - t) / (M - 1) with t = (x - low) / step between them.

Ranges (2410.08119, section 4.1): a percentile p of the full-precision values, from the share 1 - p up to p of them. In
the language model per input channel and fixed beforehand; in the vision encoder per token, taken from the token itself
whenever it is rounded (the paper does not say whether these are fixed; positions of a tower with pictures of any size
cannot be).
"""

from collections.abc import Callable, Sequence

import torch

from vlmq_vllm.offline.methods.grid import MSE, GridSearch
from vlmq_vllm.offline.methods.qvlm.entropy import Range

Rounder = Callable[[torch.Tensor], torch.Tensor]
PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)
COLUMNS = 1 << 24  # values that are sorted at once


def fake(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int) -> torch.Tensor:
    """x on `levels` points over [low, high], which broadcast against it; differentiable in all three."""
    step = ((high - low) / (levels - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    position = ((x - low) / step).clamp(0, levels - 1)
    return low + step * (position + (position.round() - position).detach())


def channel_percentiles(batches: Sequence[torch.Tensor], shares: Sequence[float]) -> list[Range]:
    """For each share p the range [C] of every channel over tensors [..., C], which are not all empty: from its (1 - p)-
    to its p-quantile, which are linear between neighbouring values."""
    rows = [part.detach().flatten(0, -2) for part in batches]
    width = max(1, COLUMNS // sum(map(len, rows)))
    found: list[list[Range]] = [[] for _ in shares]
    for start in range(0, rows[0].shape[1], width):
        ordered = torch.cat([part[:, start : start + width] for part in rows]).sort(0).values
        for ranges, share in zip(found, shares, strict=True):
            ranges.append((_at(ordered, 1 - share, 0), _at(ordered, share, 0)))
    return [tuple(torch.cat(side) for side in zip(*ranges, strict=True)) for ranges in found]


def token_percentiles(x: torch.Tensor, share: float) -> Range:
    """The range [..., 1] of every token of x [..., C] over its own channels."""
    if share == 1.0:
        low, high = x.aminmax(dim=-1, keepdim=True)
        return low, high
    ordered = x.sort(-1).values
    return _at(ordered, 1 - share, -1)[..., None], _at(ordered, share, -1)[..., None]


def row_ranges(weight: torch.Tensor, levels: int, search: GridSearch = MSE) -> Range:
    """The range [O, 1] of each row of a weight [O, I] that `search` finds; `offline/methods/grid.py` has
    the same for the widths that are served."""
    whole = low, high = weight.aminmax(dim=1, keepdim=True)
    best = (fake(weight, *whole, levels) - weight).abs().pow(search.exponent).sum(1, keepdim=True)
    for step in range(1, search.steps + 1):
        shrink = 1 - (1 - search.least) * step / search.steps
        narrow = whole[0] * shrink, whole[1] * shrink
        error = (fake(weight, *narrow, levels) - weight).abs().pow(search.exponent).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        low, high = torch.where(better, narrow[0], low), torch.where(better, narrow[1], high)
    return low, high


def _at(ordered: torch.Tensor, share: float, dim: int) -> torch.Tensor:
    """The quantile at `share` of values in ascending order along `dim`."""
    place = share * (ordered.shape[dim] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[dim] - 1)
    return torch.lerp(ordered.select(dim, below), ordered.select(dim, above), place - below)


def by_channel(bounds: Range, levels: int) -> Rounder:
    """Inputs [..., C] on the fixed range of each channel."""
    return lambda x: fake(x, *bounds, levels)


def by_token(share: float, levels: int, factors: torch.Tensor | None = None) -> Rounder:
    """Inputs [..., C] on the range of each token itself; `factors` [2] multiply its lower and upper bound."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        low, high = token_percentiles(x.detach(), share)
        return fake(x, low, high, levels) if factors is None else fake(x, low * factors[0], high * factors[1], levels)

    return rounded


def rounding(module: torch.nn.Module, rounders: dict[str, Rounder]) -> list:
    """Hooks that round what the linears of these names inside `module` read; their handles."""
    return [
        module.get_submodule(name).register_forward_pre_hook(lambda m, args, f=rounder: (f(args[0]), *args[1:]))
        for name, rounder in rounders.items()
    ]
