"""Finds quantisation grids, the scale and zero point of every row and group, and rounds to them.

Scales are rounded to the dtype in which they will be stored before anything is rounded with them, so that what the
solver sees is what is served.
"""

from dataclasses import dataclass

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat

CHUNK = 1 << 18  # weights per slice of the search, so that its temporaries stay in the cache
BLOCKS_CHUNK = 1 << 22  # the same with blocks of H, which every slice reads: few slices, 16 MiB for each temporary


@dataclass(frozen=True)
class GridSearch:
    """How scales are chosen: from a group's range (`steps` 0), or among `steps` + 1 ranges from 100 % shrunk evenly to
    `least`, the one with the least sum_i w_i |error_i|^exponent; w is the diagonal of the Hessian H where `importance`
    is set, else 1. With the diagonal blocks of H as importance it is the one with the least error^T H_gg error. The
    exponent 2.4 is that of GPTQ's public code.

    CLIP with these blocks has the aim of AWQ's search for clipped ranges (2306.00978), the least squared output error
    of each row and group. AWQ's code clamps weights to [-t, t] for t = max |w| times 1, 0.95 ... 0.55, so that a
    shorter side within t keeps its end, and judges by some 512 tokens that count alike; here both sides shrink by one
    factor, and H has all tokens with their weights.
    """

    steps: int = 35
    least: float = 0.3
    exponent: float = 2.4
    importance: bool = False


MINMAX, MSE = GridSearch(steps=0), GridSearch()
CLIP = GridSearch(steps=20, least=0.5, exponent=2, importance=True)


def find_grid(
    weight: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    search: GridSearch = MSE,
    importance: torch.Tensor | None = None,
    clipped: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale [O, G] in `dtype` and zero point [O, G] uint8 (None when symmetric) for a weight [O, I] float32.

    importance: diag H [I], or its blocks [G, w, w] (`blocks_of`) for an exponent of 2. clipped: [O] bool, the rows
    whose ranges may shrink (None: all).
    """
    importance = importance if search.importance else None
    blocks = importance is not None and importance.ndim == 3
    rows = max(1, (BLOCKS_CHUNK if blocks else CHUNK) // weight.shape[1])
    clipped = weight.new_ones(len(weight), dtype=torch.bool) if clipped is None else clipped
    parts = zip(weight.split(rows), clipped.split(rows), strict=True)
    found = [_grid_of_rows(part, format, dtype, search, importance, own) for part, own in parts]
    scale = torch.cat([scale for scale, _ in found])
    return scale, None if format.symmetric else torch.cat([zero for _, zero in found])


def blocks_of(h: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """The diagonal blocks [G, w, w] of H [I, I], one for every group; a last group that is shorter ends in zeros."""
    width = min(format.width(len(h)), len(h))
    if width == len(h):
        return h[None]
    blocks = h.new_zeros(format.groups(len(h)), width, width)
    for block, start in zip(blocks, range(0, len(h), width), strict=True):
        part = h[start : start + width, start : start + width]
        block[: len(part), : len(part)] = part
    return blocks


def to_codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int, levels: int) -> torch.Tensor:
    """Nearest codes as float; `scale` and `zero` broadcast against `weight`."""
    return (weight / scale + zero).round_().clamp_(0, levels - 1)


def on_grid(
    weight: torch.Tensor, format: WeightFormat, scale: torch.Tensor, zero: torch.Tensor | None
) -> QuantizedWeight:
    """A weight [O, I] float32 with its nearest codes on the grid of `scale` and `zero` [O, G] (None when symmetric)."""
    group = format.group_of(weight.shape[1], weight.device)
    offset = format.middle if zero is None else zero.float()[:, group]
    codes = to_codes(weight, scale.float()[:, group], offset, format.levels).to(torch.uint8)
    return QuantizedWeight(format, codes, scale, zero)


def _grid_of_rows(
    weight: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    search: GridSearch,
    importance: torch.Tensor | None,
    clipped: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`find_grid` for a few rows, with a zero point [O, G] uint8 for symmetric weights as well."""
    columns = weight.shape[1]
    groups, width = format.groups(columns), min(format.width(columns), columns)
    # the zeros that fill up the last group lie on every grid: they change neither range nor error
    padding = (0, groups * width - columns)
    grouped = torch.nn.functional.pad(weight, padding).unflatten(1, (groups, width))
    if importance is not None and importance.ndim == 1:
        importance = torch.nn.functional.pad(importance, padding).unflatten(0, (groups, width))
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    best_scale, best_zero = _grid_of_range(low, high, format, dtype)
    if search.steps:
        best = _error(grouped, best_scale, best_zero, format, search, importance)
        for step in range(1, search.steps + 1):
            shrink = 1 - (1 - search.least) * step / search.steps
            scale, zero = _grid_of_range(low * shrink, high * shrink, format, dtype)
            error = _error(grouped, scale, zero, format, search, importance)
            better = (error < best) & clipped[:, None]
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.to(dtype), best_zero.to(torch.uint8)


def _grid_of_range(
    low: torch.Tensor, high: torch.Tensor, format: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, already rounded to `dtype` but kept in float32, and zero point for ranges [low, high] around 0."""
    top = format.levels - 1
    span = 2 * torch.maximum(-low, high) if format.symmetric else high - low
    scale = (span / top).to(dtype).float()
    # a group too small for its dtype gets the smallest step there is, an all-zero one any step
    scale = scale.clamp_min(torch.finfo(dtype).smallest_normal)
    if format.symmetric:
        return scale, torch.full_like(scale, format.middle)
    return scale, (-low / scale).round().clamp(0, top)


def _error(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    format: WeightFormat,
    search: GridSearch,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """What a search compares, [O, G], for weights [O, G, w] on grids [O, G]; importance [G, w] or [G, w, w]."""
    scale, zero = scale[..., None], zero[..., None]
    codes = to_codes(grouped, scale, zero, format.levels)
    error = codes.sub_(zero).mul_(scale).sub_(grouped)
    if importance is not None and importance.ndim == 3:
        return (error.transpose(0, 1) @ importance).transpose(0, 1).mul_(error).sum(-1)
    error = error.square_() if search.exponent == 2 else error.abs_().pow_(search.exponent)
    return error.sum(-1) if importance is None else error.mul_(importance).sum(-1)
