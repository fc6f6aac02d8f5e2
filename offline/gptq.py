"""GPTQ on tensors: from a weight and the second moments of its inputs to codes.

For weights W [O, I] and moments H, D (`moments.py`) the rounded weight Q is chosen column by column (`sweep.py`) for
a small

    sum_n lambda_n | Q x_n - W f_n |^2.

With D = 0 this is GPTQ (2210.17323), with D GPTAQ (2504.02692), and the token weights make it VLMQ
(2508.03351, there with D). Pure functions of tensors; which model they come from is `walk.py`'s business.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.grid import MSE, GridSearch, find_grid, to_codes
from vlmq_vllm.offline.sweep import Sweep

STRIP = 1024  # rows of a matrix [I, I] that are treated at once
ATTEMPTS = 8  # damping grows by 4 each time: from 0.01 to more than 100


@dataclass(frozen=True)
class Solver:
    """How a weight is solved.

    act_order: treat columns by falling diag H, on grids found beforehand in file order, so that no permutation has to
    be stored. Without it a group's grid is found when its first column is reached, from weights that already carry the
    compensation. damp: part of mean(diag H) added to the diagonal. alpha: share of GPTAQ's residual that is used.
    """

    search: GridSearch = MSE
    act_order: bool = True
    damp: float = 0.01
    alpha: float = 0.25


DEFAULT = Solver()


@dataclass(frozen=True)
class Solution:
    """A solved weight. `loss` [O]: weighted squared output error per token of each row, as the solver saw it (in
    GPTAQ's case against the moved targets); `damp`: damping that was needed (None: H could not be factorised and the
    weight was rounded to nearest); `dead`: inputs that were always zero."""

    weight: QuantizedWeight
    loss: torch.Tensor | None
    damp: float | None
    dead: int

    @classmethod
    def empty(cls, format: WeightFormat, rows: int, columns: int, dtype: torch.dtype, device) -> "Solution":
        """A place for a solution that another process found, see `exchanged`."""
        groups = format.groups(columns)
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        scale = torch.zeros(rows, groups, dtype=dtype, device=device)
        zero = None if format.symmetric else torch.zeros(rows, groups, dtype=torch.uint8, device=device)
        return cls(QuantizedWeight(format, codes, scale, zero), torch.zeros(rows, device=device), None, 0)

    def exchanged(self, broadcast: Callable[[torch.Tensor], None]) -> "Solution":
        """The solution after every tensor of it went through `broadcast`, which overwrites it with the owner's."""
        numbers = torch.tensor([-1.0 if self.damp is None else self.damp, self.dead], dtype=torch.float64)
        numbers = numbers.to(self.loss.device)
        for tensor in (self.weight.codes, self.weight.scale, self.weight.zero, self.loss, numbers):
            if tensor is not None:
                broadcast(tensor)
        damp, dead = numbers.tolist()
        return replace(self, damp=None if damp < 0 else damp, dead=int(dead))

    def split(self, rows: list[int]) -> list["Solution"]:
        """The solutions of weights that were solved as one, stacked along O."""
        w = self.weight
        zeros = [None] * len(rows) if w.zero is None else w.zero.split(rows)
        parts = zip(w.codes.split(rows), w.scale.split(rows), zeros, self.loss.split(rows), strict=True)
        return [
            replace(self, weight=QuantizedWeight(w.format, codes, scale, zero), loss=loss)
            for codes, scale, zero, loss in parts
        ]


def round_to_nearest(
    weight: torch.Tensor, format: WeightFormat, dtype: torch.dtype, search: GridSearch = MSE
) -> QuantizedWeight:
    """Codes of a weight [O, I] without compensation."""
    scale, zero = find_grid(weight, format, dtype, search)
    group = format.group_of(weight.shape[1], weight.device)
    offset = format.middle if zero is None else zero.float()[:, group]
    codes = to_codes(weight, scale.float()[:, group], offset, format.levels).to(torch.uint8)
    return QuantizedWeight(format, codes, scale, zero)


def solve(
    weights: torch.Tensor,
    h: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    solver: Solver = DEFAULT,
    residual: torch.Tensor | None = None,
) -> list[Solution]:
    """Quantise weights [B, O, I] float32 with moments H and perhaps D [B, I, I]; scales are stored in `dtype`.

    The B problems are independent and treated at once. `residual` is overwritten. An H that stays singular under eight
    dampings gives plain rounding and `damp` None: the caller must say so.
    """
    columns = weights.shape[2]
    importance = h.diagonal(dim1=1, dim2=2)
    dead = (importance == 0).sum(1).tolist()
    order = torch.argsort(importance, dim=1, descending=True, stable=True) if solver.act_order else None
    if order is None:
        order = torch.arange(columns, device=weights.device).expand(len(weights), -1)
    factors = [_factor(part, columns_of, solver.damp) for part, columns_of in zip(h, order, strict=True)]
    solved = [i for i, (factor, _) in enumerate(factors) if factor is not None]
    found: list[Solution | None] = [None] * len(weights)
    if solved:
        pick = torch.tensor(solved, device=weights.device)
        factor = torch.stack([factors[i][0] for i in solved]) if len(solved) > 1 else factors[solved[0]][0][None]
        given = (weights, h, order) if residual is None else (weights, h, order, residual)
        *part, d = [t if len(solved) == len(weights) else t[pick] for t in given] + [None] * (residual is None)
        push = None
        if d is not None:
            push = _push(_permuted(d, part[2]) if solver.act_order else d, factor).mul_(solver.alpha)
        quantized, losses = _sweep(*part, factor, push, format, dtype, solver)
        for i, weight, loss in zip(solved, quantized, losses, strict=True):
            found[i] = Solution(weight, loss, factors[i][1], dead[i])
    for i in sorted(set(range(len(weights))) - set(solved)):
        rounded = round_to_nearest(weights[i], format, dtype, solver.search)
        error = rounded.dequantize() - weights[i]
        found[i] = Solution(rounded, ((error @ h[i]) * error).sum(1), None, dead[i])
    return found


def _sweep(weights, h, order, factor, push, format, dtype, solver) -> tuple[list[QuantizedWeight], torch.Tensor]:
    count, rows, columns = weights.shape
    groups = format.groups(columns)
    shape = (count, groups, rows)
    scale = torch.ones(shape, device=weights.device)
    zero = torch.full(shape, float(format.middle), device=weights.device)
    importance = h.diagonal(dim1=1, dim2=2)
    targets = _rows(weights.mT, order)
    if solver.act_order:
        for i in range(count):
            s, z = find_grid(weights[i], format, dtype, solver.search, importance[i])
            scale[i] = s.float().T
            if z is not None:
                zero[i] = z.float().T
    group_of = format.group_of(columns, weights.device)[order]
    sweep = Sweep(targets, factor, scale, zero, group_of, format.levels, push)
    if solver.act_order:
        sweep.run()
    else:
        sweep.run(columns if format.group_size == -1 else format.group_size, _finder(importance, format, dtype, solver))
    codes = torch.empty_like(sweep.codes).scatter_(1, order[..., None].expand_as(sweep.codes), sweep.codes)
    quantized = [
        QuantizedWeight(
            format,
            codes[i].T.contiguous(),
            scale[i].T.to(dtype).contiguous(),
            None if format.symmetric else zero[i].T.to(torch.uint8).contiguous(),
        )
        for i in range(count)
    ]
    return quantized, sweep.loss


def _finder(importance, format, dtype, solver):
    """Grid of one group of compensated columns [B, n, O], as `Sweep.run` asks for it."""
    whole = WeightFormat(format.bits, -1, format.symmetric)

    def find(columns: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = [
            find_grid(part.T.contiguous(), whole, dtype, solver.search, weight[first:last])
            for part, weight in zip(columns, importance, strict=True)
        ]
        scale = torch.stack([scale[:, 0].float() for scale, _ in found])
        if format.symmetric:
            return scale, torch.full_like(scale, format.middle)
        return scale, torch.stack([zero[:, 0].float() for _, zero in found])

    return find


def _factor(h: torch.Tensor, order: torch.Tensor, damp: float) -> tuple[torch.Tensor | None, float]:
    """Upper triangular U with U U^T = H + damp mean(diag H) I, columns in `order`, and the damping that worked."""
    level = h.diagonal().mean()
    if not (torch.isfinite(h).all() and level > 0):
        return None, damp
    backwards = order.flip(0)  # the lower factor of H backwards, read backwards, is the upper factor with U U^T = H
    for attempt in range(ATTEMPTS):
        used = damp * 4**attempt
        damped = _reordered(h, backwards)
        damped.diagonal().add_(used * level)
        lower, failed = _cholesky(damped)
        del damped
        # whatever is not finite in a row of the factor is so in its diagonal element
        if not failed and lower.diagonal().isfinite().all():
            lower = lower.float()
            return lower.flip(0, 1), used
    return None, damp


def _reordered(h: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """H with rows and columns in `order`: doubles where they are no slower than the memory they need, for they save the
    damping of nearly singular H."""
    found = torch.empty_like(h, dtype=torch.float64 if h.device.type == "cpu" else torch.float32)
    for start in range(0, len(h), STRIP):
        rows = slice(start, start + STRIP)
        found[rows] = h[order[rows]][:, order]
    return found


def _cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower factor of a symmetric matrix, and whether that failed; on a CPU in the memory of the matrix itself."""
    if matrix.device.type != "cpu":
        return torch.linalg.cholesky_ex(matrix)
    columns = matrix.mT  # LAPACK's order, in which nothing is copied
    return torch.linalg.cholesky_ex(columns, out=(columns, torch.empty((), dtype=torch.int32)))


def _push(residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """triu(D U^-T, 1) U^-1: how far a column's value moves the targets of those behind it (GPTAQ's public form).

    In place of D, in strips of rows: what stands left of a strip's first diagonal element neither counts nor is needed.
    """
    for start in range(0, residual.shape[1], STRIP):
        strip, own = residual[:, start : start + STRIP], factor[:, start:, start:]
        strip[..., :start] = 0
        moved = torch.linalg.solve_triangular(own.mT, strip[..., start:], upper=False, left=False).triu_(1)
        strip[..., start:] = torch.linalg.solve_triangular(own, moved, upper=True, left=False)
    return residual


def _rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.stack([part[rows] for part, rows in zip(tensor, order, strict=True)])


def _permuted(matrices: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.stack([part[rows][:, rows] for part, rows in zip(matrices, order, strict=True)])
