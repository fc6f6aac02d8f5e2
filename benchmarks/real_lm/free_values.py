"""Solves weights with free values: a row's codes stand for any 2^bits numbers, not for an even grid.

Layer-wise non-uniform quantisation (LNQ) is GuidedQuant's (2505.07004), values for each row are SqueezeLLM's
(2306.07629). With targets T and values V of a row and group, the error E = T - V[codes] costs E H E^T, and both are
found in turn: values by least squares, codes by coordinate descent (`offline/methods/gptq/refine.py` does so with
scales). They start from the product's own pass, GPTQ behind QEP's move, where k-means over what the columns before
have left of a group takes the place of a searched grid. A study: nothing packs or serves such weights. Layouts are
turned over, [I, O], with G groups of columns and L = 2^bits values.
"""

from dataclasses import dataclass, replace

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.methods.gptq.columns import LEAF, ColumnPass
from vlmq_vllm.offline.methods.gptq.factor import find_factor, qep
from vlmq_vllm.offline.methods.gptq.solve import Solver
from vlmq_vllm.offline.methods.solution import Solution

ROUNDS = 2  # of new values and new codes
LLOYD = 20  # rounds of k-means
RIDGE = 1e-4  # of the equations' diagonal, towards the values as they were


@dataclass(frozen=True)
class FreeWeight(QuantizedWeight):
    """values [G, L, O] in the dtype of the scales, which say nothing here; codes [O, I] choose among them."""

    values: torch.Tensor

    def served(self) -> torch.Tensor:
        return looked_up(self.values, self.codes.T.long(), self.format).T.float()


@dataclass(frozen=True)
class FreeSolution(Solution):
    """A solution with free values, which are split with the rows."""

    def split(self, rows: list[int]) -> list[Solution]:
        parts = super().split(rows)
        values = self.weight.values.split(rows, dim=2)
        return [
            replace(part, weight=FreeWeight(**vars(part.weight), values=own))
            for part, own in zip(parts, values, strict=True)
        ]


def solve_free(
    weights: torch.Tensor,
    h: torch.Tensor,
    format: WeightFormat,
    dtype: torch.dtype,
    solver: Solver,
    residual: torch.Tensor | None = None,
    clipped: torch.Tensor | None = None,
) -> list[Solution]:
    """Stands for `offline/methods/gptq/solve.py::solve`, with its arguments; columns are taken in file order. A group
    of `format` is what shares its values here."""
    found: list[Solution] = []
    for i, weight in enumerate(weights):
        order = torch.arange(len(h[i]))
        factor, used = find_factor(h[i], order, solver.damp)
        assert factor is not None, "the study has no answer to a singular H"
        target = weight
        if residual is not None:
            target = qep(weight[None], residual[i][None], factor[None], order[None], solver.alpha)[0]
        damped = h[i] + used * h[i].diagonal().mean() * torch.eye(len(h[i]))
        values, codes = first_solution(target.T, factor, format)
        values, codes, loss = Descent(target.T.contiguous(), damped, format, dtype).improved(values, codes, ROUNDS)
        empty = Solution.empty(format, len(weight), len(order), dtype, weight.device).weight
        stored = vars(empty) | {"codes": codes.T.to(torch.uint8).contiguous()}
        dead = int((h[i].diagonal() == 0).sum())
        found.append(FreeSolution(FreeWeight(**stored, values=values.to(dtype)), loss, used, dead))
    return found


def looked_up(values: torch.Tensor, codes: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """Weights [I, O] of values [G, L, O] and codes [I, O] int64."""
    spans = codes.split(min(format.width(len(codes)), len(codes)))
    return torch.cat([own.gather(0, span) for own, span in zip(values, spans, strict=True)])


def clustered(weights: torch.Tensor, levels: int) -> torch.Tensor:
    """Values [levels, O], rising, by k-means over each column of weights [n, O], started evenly among their ranks."""
    places = (torch.arange(levels) + 0.5) / levels * len(weights)
    values, ones = weights.sort(0).values[places.long()], torch.ones_like(weights)
    for _ in range(LLOYD):
        codes = nearest(weights, between(values))
        count = torch.zeros_like(values).scatter_add_(0, codes, ones)
        sums = torch.zeros_like(values).scatter_add_(0, codes, weights)
        values = torch.where(count > 0, sums / count.clamp_min(1), values)
    return values.sort(0).values


def between(values: torch.Tensor) -> torch.Tensor:
    """Half way between rising values [..., L, O], [..., L - 1, O]."""
    return (values[..., 1:, :] + values[..., :-1, :]) / 2


def nearest(weights: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """Codes of the values with these `borders` [L - 1, O] that are nearest to weights [..., O]."""
    return sum((weights > border).long() for border in borders)


class FreePass(ColumnPass):
    """A pass whose scale, and zero, are the values [B, G, L, O] of every group."""

    def _columns_in_torch(self, start: int, stop: int) -> None:
        diagonal = self.factor.diagonal(dim1=1, dim2=2)[:, start:stop, None]
        for k in range(start, stop):
            values, _ = self._grid(k)
            value = self.remainder[:, k] + self.owed[:, k] / diagonal[:, k - start]
            codes = nearest(value, between(values[0]))  # there is one problem
            self.codes[:, k] = codes
            self.remainder[:, k] -= values.gather(1, codes[:, None])[:, 0]
            if k + 1 < stop:
                row = self.factor[:, k, k + 1 : stop, None]
                self.owed[:, k + 1 : stop].addcmul_(row, self.remainder[:, None, k])


def first_solution(target: torch.Tensor, factor: torch.Tensor, format: WeightFormat) -> tuple:
    """Values [G, L, O] and codes [I, O] by GPTQ, a group's values found when its first column is reached."""
    columns, rows = target.shape
    values = target.new_zeros(1, format.groups(columns), format.levels, rows)
    group_of = format.group_of(columns)[None]
    sweep = FreePass(target[None].clone(), factor[None], values, values, group_of, format.levels)

    def find(compensated: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = clustered(compensated[0], format.levels)[None]
        return found, found

    sweep.run(format.width(columns), find)
    return values[0], sweep.codes[0].long()


@dataclass(frozen=True)
class Descent:
    """What stays while values [G, L, O] and codes [I, O] are improved: targets [I, O] and H [I, I], damped."""

    target: torch.Tensor
    h: torch.Tensor
    format: WeightFormat
    dtype: torch.dtype

    def improved(self, values: torch.Tensor, codes: torch.Tensor, rounds: int) -> tuple[torch.Tensor, ...]:
        """Values, codes and cost [O] after `rounds`; values are rounded to `dtype` throughout."""
        wanted, values = self.h @ self.target, values.to(self.dtype).float()
        for _ in range(rounds):
            found = self._best_values(wanted, values, codes).to(self.dtype).float()
            better = self._state(found, codes)[1] < self._state(values, codes)[1]
            values, places = torch.where(better, found, values).sort(1)
            codes = looked_up(places.argsort(1), codes, self.format)  # the same weights with rising values
            self._choose_codes(self._state(values, codes)[0], values, codes)
        return values, codes, self._state(values, codes)[1]

    def _state(self, values: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H E [I, O], and the cost [O]."""
        error = self.target - looked_up(values, codes, self.format)
        pull = self.h @ error
        return pull, (error * pull).sum(0)

    def _best_values(self, wanted: torch.Tensor, values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Values with the least cost for the codes, by G L equations for each row; wanted: H T [I, O]."""
        groups, levels, rows = values.shape
        width = min(self.format.width(len(self.h)), len(self.h))
        spans, none = codes.split(width), torch.zeros_like(values[0])

        def summed(x: torch.Tensor) -> torch.Tensor:
            """[O, G L]: sums of x [I, O] over the columns with the same value."""
            return torch.cat([none.scatter_add(0, *own) for own in zip(spans, x.split(width), strict=True)]).T

        left = values.new_empty(rows, groups * levels, groups * levels)
        for i in range(groups * levels):
            group, level = divmod(i, levels)
            columns = self.h[:, group * width : (group + 1) * width]
            left[:, i] = summed(columns @ (spans[group] == level).float())
        # a value that no column has keeps what it was
        ridge = left.diagonal(dim1=1, dim2=2).mul(RIDGE).clamp_min(torch.finfo(torch.float32).tiny)
        left.diagonal(dim1=1, dim2=2).add_(ridge)
        right = summed(wanted) + ridge * values.flatten(0, 1).T
        found = torch.linalg.solve(left.double(), right.double()).float()
        return found.T.unflatten(0, (groups, levels)).contiguous()

    def _choose_codes(self, pull: torch.Tensor, values: torch.Tensor, codes: torch.Tensor) -> None:
        """The best code of each column in turn, in place; pull: H E, overwritten."""
        h, borders = self.h, between(values)
        group_of, diagonal = self.format.group_of(len(h)).tolist(), h.diagonal().tolist()
        for start in range(0, len(h), LEAF):
            span = slice(start, min(start + LEAF, len(h)))
            moved = torch.empty_like(pull[span])
            for k in range(span.start, span.stop):
                own = values[group_of[k]]
                before = own.gather(0, codes[k][None])[0]
                codes[k] = nearest(before + pull[k] / diagonal[k], borders[group_of[k]])
                moved[k - start] = own.gather(0, codes[k][None])[0] - before
                pull[k + 1 : span.stop].addcmul_(h[k + 1 : span.stop, k, None], moved[None, k - start], value=-1)
            pull[span.stop :].addmm_(h[span.stop :, span], moved, alpha=-1)
