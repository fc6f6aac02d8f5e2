"""Quantisation grids: the scale and zero point of every row and group, and rounding to them.

Scales are rounded to the dtype in which they will be stored before anything is rounded with them, so that what the
solver sees is what is served.
"""

import torch

from vlmq_vllm.format import WeightFormat

SHRINKS = torch.linspace(1.0, 0.3, 36).tolist()
EXPONENT = 2.4  # of the error in the search; the value of GPTQ's public code
CHUNK = 1 << 22  # weights per slice of the search, so that its temporaries stay small


def find_grid(
    weight: torch.Tensor, format: WeightFormat, dtype: torch.dtype, search: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale [O, G] in `dtype` and zero point [O, G] uint8 (None when symmetric) for a weight [O, I] float32.

    `search` chooses per group, among ranges shrunk to 30 .. 100 %, the one with the least sum |error|^2.4.
    """
    rows = max(1, CHUNK // weight.shape[1])
    parts = [_grid_of_rows(part, format, dtype, search) for part in weight.split(rows)]
    scale = torch.cat([scale for scale, _ in parts])
    return scale, None if format.symmetric else torch.cat([zero for _, zero in parts])


def to_codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int, levels: int) -> torch.Tensor:
    """Nearest codes as float; `scale` and `zero` broadcast against `weight`."""
    return (weight / scale + zero).round_().clamp_(0, levels - 1)


def _grid_of_rows(weight, format, dtype, search):
    groups = format.groups(weight.shape[1])
    width = weight.shape[1] if format.group_size == -1 else min(format.group_size, weight.shape[1])
    # the zeros that fill up the last group lie on every grid: they change neither range nor error
    grouped = torch.nn.functional.pad(weight, (0, groups * width - weight.shape[1])).unflatten(1, (groups, width))
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    best_scale, best_zero = _grid_of_range(low, high, format, dtype)
    if search:
        best = _error(grouped, best_scale, best_zero, format)
        for shrink in SHRINKS[1:]:
            scale, zero = _grid_of_range(low * shrink, high * shrink, format, dtype)
            error = _error(grouped, scale, zero, format)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.to(dtype), best_zero.to(torch.uint8)


def _grid_of_range(low, high, format, dtype):
    """Scale, already rounded to `dtype` but kept in float32, and zero point for ranges [low, high] around 0."""
    top = format.levels - 1
    span = 2 * torch.maximum(-low, high) if format.symmetric else high - low
    scale = (span / top).to(dtype).float()
    # a group too small for its dtype gets the smallest step there is, an all-zero one any step
    scale = scale.clamp_min(torch.finfo(dtype).smallest_normal)
    if format.symmetric:
        return scale, torch.full_like(scale, format.middle)
    return scale, (-low / scale).round().clamp(0, top)


def _error(grouped, scale, zero, format):
    scale, zero = scale[..., None], zero[..., None]
    codes = to_codes(grouped, scale, zero, format.levels)
    return ((codes - zero) * scale - grouped).abs_().pow_(EXPONENT).sum(-1)
