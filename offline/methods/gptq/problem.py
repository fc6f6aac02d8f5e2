"""Linears with the same input, token weights and format share one Hessian and are solved as one problem.

Hessians of a stage are summed in one pass over the data; problems of one shape are solved together, each on its rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.gptq.moments import Moments
from vlmq_vllm.offline.methods.gptq.solve import Solution, Solver, solve, stack
from vlmq_vllm.offline.model.groups import Group
from vlmq_vllm.offline.model.layers import is_clipped, linear_of, with_parameters
from vlmq_vllm.offline.model.streams import Stream

TOGETHER = 1 << 28  # bytes of Hessians that are solved as one batch of problems


@dataclass
class Problem:
    """Linears that are solved as one, their weights stacked along the rows. rows: of each. dtype: of the scales.
    token_weights: [N] per batch, or None where all count alike."""

    linears: Group
    rows: list[int]
    format: WeightFormat
    dtype: torch.dtype
    moments: Moments
    token_weights: list[torch.Tensor] | None

    @property
    def shape(self) -> tuple[int, int, WeightFormat, torch.dtype]:
        """What problems have in common that are solved together."""
        return sum(self.rows), len(self.moments.h), self.format, self.dtype

    def rounds(self, solver: Solver) -> int:
        """How often the solution is refined: not where its tokens, of all ranks, are too few for its columns."""
        return solver.refine if self.moments.tokens >= solver.refine_from * len(self.moments.h) else 0


def _stacked(layer: torch.nn.Module, linears: Group) -> torch.Tensor:
    """The linears' weights [O, I], one after the other along the rows."""
    found = [linear_of(layer, linear).weight for linear in linears]
    return torch.cat(found) if len(found) > 1 else found[0]


def find_problems(
    layer: torch.nn.Module,
    stage: list[Group],
    token_weights: Mapping[str, list[torch.Tensor]],
    base: str,
    format_of: Callable[[str], WeightFormat],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
) -> list[Problem]:
    """The problems of a stage: linears of a group with one format and the very same list of token weights are one.
    base: as in the settings; it decides whether and how the moments keep a residual."""
    problems = []
    for group in stage:
        columns = linear_of(layer, group[0]).in_features
        alike: dict[tuple, list[str]] = {}
        for linear in group:
            alike.setdefault((id(token_weights.get(linear)), format_of(linear)), []).append(linear)
        for linears in map(tuple, alike.values()):
            rows = [linear_of(layer, linear).out_features for linear in linears]
            known = _stacked(layer, linears) if base == "qep" and is_flat(sum(rows), columns) else None
            moments = Moments(columns, device, base != "gptq", known)
            first = linears[0]
            problems.append(
                Problem(linears, rows, format_of(first), dtype_of(first), moments, token_weights.get(first))
            )
    return problems


def is_flat(rows: int, columns: int) -> bool:
    """Whether W D is better summed than D: it is smaller, and up to I/2 rows the sum costs fewer multiplications."""
    return 2 * rows <= columns


def collect(
    problems: list[Problem],
    layer: torch.nn.Module,
    index: int,
    quantized: list[Stream],
    full: list[Stream],
    originals: Mapping[str, torch.Tensor],
) -> None:
    """One pass over the batches: the Hessian of every problem, and GPTAQ's residual where its moments hold one.

    originals: the layer's full-precision parameters by their names in it, for the residual.
    """
    first = {problem.linears[0]: problem for problem in problems}
    for i, stream in enumerate(quantized):
        targets: dict[str, torch.Tensor] = {}
        if any(problem.moments.residual is not None for problem in problems):
            with with_parameters(layer, originals):
                full[i].inputs_of(layer, index, first, targets.__setitem__)

        def visit(linear: str, inputs: torch.Tensor, i: int = i, targets: dict = targets) -> None:
            problem = first[linear]
            own = problem.token_weights[i] if problem.token_weights else None
            problem.moments.add(inputs, own, targets.get(linear))

        stream.inputs_of(layer, index, first, visit)


def solve_all(problems: list[Problem], layer: torch.nn.Module, solver: Solver, ranks: Ranks) -> list[Solution]:
    """The solutions of all problems, on every rank. Their moments are used up."""
    for number, problem in enumerate(problems):
        owner, moments = ranks.owner(number), problem.moments
        moments.tokens = int(ranks.add(torch.tensor([float(moments.tokens)], device=moments.h.device)))
        ranks.reduce(moments.h, owner)
        if moments.residual is not None:
            ranks.reduce(moments.residual, owner)
    own = [number for number in range(len(problems)) if ranks.owner(number) == ranks.rank]
    found: dict[int, Solution] = {}
    for numbers in _alike(problems, own, solver):
        solutions = _solve_together([problems[i] for i in numbers], layer, solver)
        found |= dict(zip(numbers, solutions, strict=True))
    exchanged = []
    for number, problem in enumerate(problems):
        rows, columns, format, dtype = problem.shape
        solution = found.get(number) or Solution.empty(format, rows, columns, dtype, problem.moments.h.device)
        exchanged.append(solution.exchanged(partial(ranks.broadcast, owner=ranks.owner(number))))
    return exchanged


def _solve_together(problems: Sequence[Problem], layer: torch.nn.Module, solver: Solver) -> list[Solution]:
    """The solutions of problems of one shape that are refined alike."""
    weights = stack([_stacked(layer, problem.linears) for problem in problems])
    means = [problem.moments.mean() for problem in problems]
    residuals = [residual for _, residual in means if residual is not None]
    residual = stack(residuals) if residuals else None
    clipped, first = None, problems[0]
    if not solver.compensate:
        allowed = torch.tensor(_clipped(first, solver), device=weights.device)
        clipped = allowed.repeat_interleave(torch.tensor(first.rows, device=weights.device))
    solver = replace(solver, refine=first.rounds(solver))
    return solve(weights, stack([h for h, _ in means]), first.format, first.dtype, solver, residual, clipped)


def _clipped(problem: Problem, solver: Solver) -> tuple[bool, ...]:
    """Of each of its linears, whether a solver that rounds may shrink its ranges."""
    return () if solver.compensate else tuple(map(is_clipped, problem.linears))


def _alike(problems: list[Problem], numbers: list[int], solver: Solver) -> list[list[int]]:
    """Numbers of problems in batches of one shape and a bounded size, refined alike."""
    batches: dict[tuple, list[list[int]]] = {}
    for number in numbers:
        problem = problems[number]
        shape = problem.shape
        found = batches.setdefault((*shape, _clipped(problem, solver), problem.rounds(solver)), [[]])
        if found[-1] and (len(found[-1]) + 1) * 4 * shape[1] ** 2 > TOGETHER:
            found.append([])
        found[-1].append(number)
    return [numbers for found in batches.values() for numbers in found]
