"""GPTQ on tensors: from a weight and the second moments of its inputs to codes.

For weights W [O, I] and moments H, D (`moments.py`) the rounded weight Q is chosen column by column (`sweep.py`) for
a small

    sum_n lambda_n | Q x_n - W f_n |^2.

With D = 0 this is GPTQ (2210.17323), with D GPTAQ (2504.02692), and the token weights make it VLMQ
(2508.03351, there with D). GPTAQ moves what is left of the target column by column, which its authors derive with
columns that are frozen already. Before any is, the normal equations give the whole move in closed form,

    Q (H) = W sum_n lambda_n f_n x_n^T = W (H + D),    so that W + W D H^-1 is to be rounded, by plain GPTQ;

here this is "aligned". Pure functions of tensors; which model they come from is `walk.py`'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.factor import aligned, find_factor, push_of
from vlmq_vllm.offline.grid import MSE, GridSearch, find_grid, to_codes
from vlmq_vllm.offline.sweep import Sweep


@dataclass(frozen=True)
class Solver:
    """How a weight is solved.

    act_order: treat columns by falling diag H, on grids found beforehand in file order, so that no permutation has to
    be stored. Without it a group's grid is found when its first column is reached, from weights that already carry the
    compensation. damp: part of mean(diag H) added to the diagonal. alpha: share of the residual D that is used.
    aligned: D moves the weights beforehand (above), not column by column as in GPTAQ.
    """

    search: GridSearch = MSE
    act_order: bool = True
    damp: float = 0.01
    alpha: float = 0.25
    aligned: bool = False


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
    """Quantise weights [B, O, I] float32 with moments H [B, I, I]; scales are stored in `dtype`.

    residual: D [B, I, I], or where the solver is `aligned` and O < I perhaps W D [B, O, I]; overwritten. The B
    problems are independent and treated at once. An H that stays singular under eight dampings gives plain rounding
    and `damp` None: the caller must say so.
    """
    importance = h.diagonal(dim1=1, dim2=2)
    if solver.act_order:
        order = torch.argsort(importance, dim=1, descending=True, stable=True)
    else:
        order = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
    factors = [find_factor(part, columns, solver.damp) for part, columns in zip(h, order, strict=True)]
    dead = (importance == 0).sum(1).tolist()
    found: dict[int, Solution] = {}
    if solved := [i for i, (factor, _) in enumerate(factors) if factor is not None]:
        pick = slice(None) if len(solved) == len(h) else torch.tensor(solved, device=h.device)
        factor = stack([factors[i][0] for i in solved])
        targets, push = weights[pick], None
        if residual is not None and solver.aligned:
            targets = aligned(targets, residual[pick], factor, order[pick], solver.alpha)
        elif residual is not None:
            moves = _permuted(residual[pick], order[pick]) if solver.act_order else residual[pick]
            push = push_of(moves, factor).mul_(solver.alpha)
        quantized, losses = _sweep(targets, importance[pick], order[pick], factor, push, format, dtype, solver)
        for i, weight, loss in zip(solved, quantized, losses, strict=True):
            found[i] = Solution(weight, loss, factors[i][1], dead[i])
    for i in set(range(len(h))) - found.keys():
        rounded = round_to_nearest(weights[i], format, dtype, solver.search)
        error = rounded.dequantize() - weights[i]
        found[i] = Solution(rounded, ((error @ h[i]) * error).sum(1), None, dead[i])
    return [found[i] for i in range(len(h))]


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor more dimensional; a view where there is only one, which may be large."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


def _sweep(
    weights, importance, order, factor, push, format, dtype, solver
) -> tuple[list[QuantizedWeight], torch.Tensor]:
    count, rows, columns = weights.shape
    groups = format.groups(columns)
    shape = (count, groups, rows)
    scale = torch.ones(shape, device=weights.device)
    zero = torch.full(shape, float(format.middle), device=weights.device)
    if solver.act_order:
        for i in range(count):
            s, z = find_grid(weights[i], format, dtype, solver.search, importance[i])
            scale[i] = s.float().T
            if z is not None:
                zero[i] = z.float().T
    group_of = format.group_of(columns, weights.device)[order]
    sweep = Sweep(_rows(weights.mT, order), factor, scale, zero, group_of, format.levels, push)
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


def _rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.stack([part[rows] for part, rows in zip(tensor, order, strict=True)])


def _permuted(matrices: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.stack([part[rows][:, rows] for part, rows in zip(matrices, order, strict=True)])
