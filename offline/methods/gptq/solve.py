"""Solves weights by GPTQ: from a weight and the Hessian of its inputs to codes.

For weights W [O, I], the Hessian H and the residual D (`moments.py`) the rounded weight Q is chosen column by column
(`columns.py`) for a small

    sum_n lambda_n | Q x_n - W f_n |^2.

With D = 0 this is GPTQ (2210.17323), with D GPTAQ (2504.02692), and the token weights make it VLMQ
(2508.03351, there with D). GPTAQ moves what is left of the target column by column, which its authors derive with
columns that are frozen already. Before any is, the normal equations give the whole move in closed form,

    Q (H) = W sum_n lambda_n f_n x_n^T = W (H + D),    so that W + W D H^-1 is to be rounded, by plain GPTQ;

which is QEP (2504.09629; base "qep").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.methods.gptq.columns import ColumnPass
from vlmq_vllm.offline.methods.gptq.factor import find_factor, push_of, qep
from vlmq_vllm.offline.methods.gptq.refine import refine
from vlmq_vllm.offline.methods.grid import MSE, GridSearch, blocks_of, find_grid, on_grid
from vlmq_vllm.offline.methods.solution import Solution


@dataclass(frozen=True)
class Solver:
    """How a weight is solved.

    act_order: treat columns by falling diag H, on grids found beforehand in file order, so that no permutation has to
    be stored. Without it a group's grid is found when its first column is reached, from weights that already carry the
    compensation. damp: part of mean(diag H) added to the diagonal. alpha: share of the residual D that is used. qep: D
    moves the weights beforehand (above), not column by column as in GPTAQ. refine: rounds of new scales and codes
    afterwards (`refine.py`). refine_from: whoever knows the tokens leaves that out where there are fewer than these for
    each column. compensate: without it codes are the nearest ones, on grids for which a search with importance gets the
    blocks of H: AWQ's clipping (2306.00978).
    """

    search: GridSearch = MSE
    act_order: bool = True
    damp: float = 0.01
    alpha: float = 0.25
    qep: bool = False
    refine: int = 0
    refine_from: float = 0.0
    compensate: bool = True


DEFAULT = Solver()


def round_to_nearest(
    weight: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    search: GridSearch = MSE,
    importance: torch.Tensor | None = None,
    clipped: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Codes of a weight [O, I] without compensation; `importance` and `clipped` as in `find_grid`."""
    scale, zero = find_grid(weight, format, dtype, search, importance, clipped)
    return on_grid(weight, format, scale, zero)


def solve(
    weights: torch.Tensor,
    h: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    solver: Solver = DEFAULT,
    residual: torch.Tensor | None = None,
    clipped: torch.Tensor | None = None,
) -> list[Solution]:
    """Quantise weights [B, O, I] float32 with Hessians H [B, I, I]; scales are stored in `dtype`.

    residual: D [B, I, I], or where the solver is `qep` and O < I perhaps W D [B, O, I]; overwritten. The B
    problems are independent and treated at once. An H that stays singular under eight dampings gives plain rounding
    and `damp` None: the caller must say so. clipped: [O] bool, the rows whose ranges may shrink (None: all), for a
    solver that does not compensate, which takes no residual.
    """
    if not solver.compensate:
        assert residual is None, "a residual moves the targets of a solver that compensates"
        return [
            _nearest(w, part, format, dtype, solver.search, 0.0, clipped) for w, part in zip(weights, h, strict=True)
        ]
    assert clipped is None, "ranges are kept from shrinking only where nothing is compensated"
    importance = h.diagonal(dim1=1, dim2=2)
    if solver.act_order:
        order = torch.argsort(importance, dim=1, descending=True, stable=True)
    else:
        order = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
    factors = [find_factor(part, columns, solver.damp) for part, columns in zip(h, order, strict=True)]
    dead = (importance == 0).sum(1).tolist()
    found: dict[int, Solution] = {}
    if factored := {i: factor for i, (factor, _) in enumerate(factors) if factor is not None}:
        pick: slice | torch.Tensor = slice(None)
        if len(factored) < len(h):
            pick = torch.tensor(list(factored), device=h.device)
        factor = stack(list(factored.values()))
        moves = None if residual is None else residual[pick]
        targets, push = _moved(weights[pick], moves, factor, order[pick], solver)
        del moves  # where `pick` copies, the columns need that memory
        quantized, losses = _by_columns(targets, importance[pick], order[pick], factor, push, format, dtype, solver)
        for i, target, weight, loss in zip(factored, targets, quantized, losses, strict=True):
            used = factors[i][1]
            if solver.refine:
                weight, loss = refine(target, h[i], used * float(importance[i].mean()), weight, solver.refine)
            found[i] = Solution(weight, loss, used, dead[i], solver.refine)
    for i in set(range(len(h))) - found.keys():
        found[i] = _nearest(weights[i], h[i], format, dtype, solver.search, None, None)
    return [found[i] for i in range(len(h))]


def _nearest(
    weight: torch.Tensor,
    h: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    search: GridSearch,
    damp: float | None,
    clipped: torch.Tensor | None,
) -> Solution:
    """The solution without compensation; `damp` None says that H was singular and is no guide for grids either."""
    blocks = blocks_of(h, format) if search.importance and damp is not None else None
    rounded = round_to_nearest(weight, format, dtype, search, blocks, clipped)
    error = rounded.dequantize() - weight
    return Solution(rounded, ((error @ h) * error).sum(1), damp, int((h.diagonal() == 0).sum()))


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor more dimensional; a view where there is only one, which may be large."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


def _moved(
    weights: torch.Tensor, residual: torch.Tensor | None, factor: torch.Tensor, order: torch.Tensor, solver: Solver
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The targets [B, O, I] of the columns, and how far each moves the later ones, [B, I, I] in `order` (None: not)."""
    if residual is None:
        return weights, None
    if solver.qep:
        return qep(weights, residual, factor, order, solver.alpha), None
    if solver.act_order:
        residual = stack([part[own][:, own] for part, own in zip(residual, order, strict=True)])
    return weights, push_of(residual, factor).mul_(solver.alpha)


def _by_columns(
    weights: torch.Tensor,
    importance: torch.Tensor,
    order: torch.Tensor,
    factor: torch.Tensor,
    push: torch.Tensor | None,
    format: WeightFormat,
    dtype: torch.dtype,
    solver: Solver,
) -> tuple[list[QuantizedWeight], torch.Tensor]:
    """Targets [B, O, I] rounded column by column, and the loss [B, O] of their rows; factor and push are in `order`."""
    count, rows, columns = weights.shape
    if solver.act_order:
        scale, zero = _grids(weights, importance, format, dtype, solver.search)
    else:
        scale = weights.new_ones(count, format.groups(columns), rows)
        zero = torch.full_like(scale, format.middle)
    group_of = format.group_of(columns, weights.device)[order]
    # part by part: take_along_dim would make an index of 64 bits for every weight
    targets = stack([part[own] for part, own in zip(weights.mT, order, strict=True)])
    sweep = ColumnPass(targets, factor, scale, zero, group_of, format.levels, push)
    whole = WeightFormat(format.bits, -1, format.symmetric)

    def find(compensated: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = _grids(compensated.mT, importance[:, first:last], whole, dtype, solver.search)
        return scale[:, 0], zero[:, 0]

    if solver.act_order:
        sweep.run()
    else:
        sweep.run(format.width(columns), find)
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


def _grids(
    weights: torch.Tensor, importance: torch.Tensor, format: WeightFormat, dtype: torch.dtype, search: GridSearch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [B, G, O] float32 for weights [B, O, I], importance [B, I]."""
    pairs = zip(weights, importance, strict=True)
    found = [find_grid(weight.contiguous(), format, dtype, search, own) for weight, own in pairs]
    scale = torch.stack([scale.float().T for scale, _ in found])
    zeros = [zero.float().T for _, zero in found if zero is not None]
    return scale, torch.stack(zeros) if zeros else torch.full_like(scale, format.middle)
