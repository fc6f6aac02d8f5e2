"""GPTQ on tensors: weighted second moments of the inputs, and the column solver that uses them.

For a linear with weight W [O, I] and calibration inputs x_n [I] with token weights lambda_n, the rounded weight Q is
chosen column by column so that sum_n lambda_n |(W - Q) x_n|^2 stays small (Frantar et al., GPTQ, 2210.17323, Alg. 1;
the weights are those of VLMQ, 2508.03351: lambda = 1 gives GPTQ itself). Only H = sum_n lambda_n x_n x_n^T is needed.

Pure functions of tensors; which model they come from is `quantize.py`'s business.
"""

from dataclasses import dataclass

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.grid import find_grid, to_codes

BLOCK = 128
ATTEMPTS = 8  # damping grows by 4 each time: from 0.01 to more than 100


@dataclass(frozen=True)
class Solution:
    """A solved weight. `loss`: weighted squared output error per token and row, `damp`: damping that was needed
    (None: H could not be factorised and the weight was rounded to nearest), `dead`: inputs that were always zero."""

    weight: QuantizedWeight
    loss: float
    damp: float | None
    dead: int


class Moments:
    """Running H = sum_n lambda_n x_n x_n^T, [I, I] float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens: inputs [N, I], weights [N] or None for 1."""
        inputs = inputs.float()
        if weights is not None:
            inputs = inputs * weights.float().sqrt()[:, None]
        self.sum.addmm_(inputs.T, inputs)
        self.tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        return self.sum / max(self.tokens, 1)


def round_to_nearest(weight: torch.Tensor, format: WeightFormat, dtype: torch.dtype, search: bool) -> QuantizedWeight:
    """Codes of a weight [O, I] without compensation."""
    scale, zero = find_grid(weight, format, dtype, search)
    group = format.group_of(weight.shape[1], weight.device)
    offset = format.middle if zero is None else zero.float()[:, group]
    codes = to_codes(weight, scale.float()[:, group], offset, format.levels)
    return QuantizedWeight(format, codes.to(torch.uint8), scale, zero)


def solve(
    weight: torch.Tensor,
    moments: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    *,
    search: bool = True,
    act_order: bool = True,
    damp: float = 0.01,
) -> Solution:
    """Quantise weight [O, I] float32 with moments H [I, I]; scales are stored in `dtype`.

    With `act_order` the columns are treated by falling diag H, on grids found beforehand in file order, so that no
    permutation has to be stored. Without it a group's grid is found when its first column is reached, from weights
    that already carry the compensation. An H that stays singular under eight dampings gives plain rounding and
    `damp` None: the caller must say so.
    """
    dead = int((moments.diagonal() == 0).sum())
    order = torch.argsort(moments.diagonal(), descending=True, stable=True) if act_order else None
    factor, used = _inverse_factor(moments if order is None else moments[order][:, order], damp)
    if factor is None:
        rounded = round_to_nearest(weight, format, dtype, search)
        return Solution(rounded, _loss(weight, rounded, moments), None, dead)
    if order is None:
        quantized = _columns_in_file_order(weight, factor, format, dtype, search)
    else:
        quantized = _columns_by_importance(weight, factor, order, format, dtype, search)
    return Solution(quantized, _loss(weight, quantized, moments), used, dead)


def _columns_by_importance(weight, factor, order, format, dtype, search) -> QuantizedWeight:
    scale, zero = find_grid(weight, format, dtype, search)
    group = format.group_of(weight.shape[1], weight.device)[order]
    scales = scale.float()[:, group]
    zeros = torch.full_like(scales, format.middle) if zero is None else zero.float()[:, group]
    sweep = _Sweep(weight[:, order], factor)
    for start in range(0, weight.shape[1], BLOCK):
        sweep.block(start, min(start + BLOCK, weight.shape[1]), scales, zeros, format.levels)
    codes = torch.empty_like(sweep.codes)
    codes[:, order] = sweep.codes
    return QuantizedWeight(format, codes, scale, zero)


def _columns_in_file_order(weight, factor, format, dtype, search) -> QuantizedWeight:
    columns = weight.shape[1]
    width = columns if format.group_size == -1 else format.group_size
    sweep, scales, zeros = _Sweep(weight, factor), [], []
    scale_of, zero_of = torch.empty_like(weight), torch.full_like(weight, format.middle)
    for first in range(0, columns, width):
        last = min(first + width, columns)
        whole = WeightFormat(format.bits, -1, format.symmetric)
        scale, zero = find_grid(sweep.weight[:, first:last].contiguous(), whole, dtype, search)
        scales.append(scale)
        scale_of[:, first:last] = scale.float()
        if zero is not None:
            zeros.append(zero)
            zero_of[:, first:last] = zero.float()
        for start in range(first, last, BLOCK):
            sweep.block(start, min(start + BLOCK, last), scale_of, zero_of, format.levels)
    return QuantizedWeight(format, sweep.codes, torch.cat(scales, 1), torch.cat(zeros, 1) if zeros else None)


class _Sweep:
    """The state of one pass over the columns: the compensated weight [O, I] and the codes found so far.

    `factor` is the upper Cholesky factor of H^-1; its row q holds how an error in column q is best made good by the
    columns after it (GPTQ, section 3.3).
    """

    def __init__(self, weight: torch.Tensor, factor: torch.Tensor) -> None:
        self.weight = weight.clone()
        self.factor = factor
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

    def block(self, start: int, stop: int, scales: torch.Tensor, zeros: torch.Tensor, levels: int) -> None:
        """Round columns start .. stop; what they owe to later columns is applied once, at the end."""
        block, factor = self.weight[:, start:stop], self.factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, scale, zero = block[:, i], scales[:, start + i], zeros[:, start + i]
            codes = to_codes(column, scale, zero, levels)
            self.codes[:, start + i] = codes.to(torch.uint8)
            errors[:, i] = (column - (codes - zero) * scale) / factor[i, i]
            block[:, i + 1 :].addr_(errors[:, i], factor[i, i + 1 :], alpha=-1)
        self.weight[:, stop:].addmm_(errors, self.factor[start:stop, stop:], alpha=-1)


def _inverse_factor(moments: torch.Tensor, damp: float) -> tuple[torch.Tensor | None, float]:
    """Upper Cholesky factor of (H + damp mean(diag H) I)^-1 and the damping that worked, starting at `damp`."""
    level = moments.diagonal().mean()
    if not (torch.isfinite(moments).all() and level > 0):
        return None, damp
    # where doubles are no slower than the memory they need, they save the damping of nearly singular H
    exact = moments.double() if moments.device.type == "cpu" else moments
    for attempt in range(ATTEMPTS):
        used = damp * 4**attempt
        damped = exact + torch.eye(len(moments), dtype=exact.dtype, device=exact.device) * (used * level)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper.float(), used
    return None, damp


def _loss(weight: torch.Tensor, quantized: QuantizedWeight, moments: torch.Tensor) -> float:
    error = quantized.dequantize() - weight
    return float(((error @ moments) * error).sum() / len(weight))
