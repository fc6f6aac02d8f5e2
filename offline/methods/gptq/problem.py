"""Linears with the same input, token weights and format share one Hessian and are solved as one problem.

Hessians of a stage are summed in one pass over the data; problems of one shape are solved together, each on its rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.gptq.moments import Moments
from vlmq_vllm.offline.methods.gptq.solve import Solution, Solver, solve, stack
from vlmq_vllm.offline.model.groups import Group
from vlmq_vllm.offline.model.layers import is_clipped, with_parameters
from vlmq_vllm.offline.model.streams import Stream

TOGETHER = 1 << 28  # bytes of Hessians that are solved as one batch of problems


@dataclass
class Problem:
    """Linears that are solved as one, their weights stacked along the rows.

    rows: of each linear. format: what they become. dtype: of the scales. weights: of the tokens, [N] per batch, or None
    where all count alike.
    """

    linears: Group
    rows: list[int]
    format: WeightFormat
    dtype: torch.dtype
    moments: Moments | None
    weights: list[torch.Tensor] | None

    @property
    def shape(self) -> tuple[int, int, WeightFormat, torch.dtype]:
        """What problems have in common that are solved together."""
        return sum(self.rows), len(self.moments.h), self.format, self.dtype

    def stacked(self, layer: torch.nn.Module) -> torch.Tensor:
        """The weights [O, I]."""
        found = [layer.get_submodule(linear).weight for linear in self.linears]
        return torch.cat(found) if len(found) > 1 else found[0]


def find_problems(
    layer: torch.nn.Module,
    stage: list[Group],
    weights: dict[str, list[torch.Tensor]],
    base: str,
    format_of: Callable[[str], WeightFormat],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
) -> list[Problem]:
    """The problems of a stage: linears of a group that share their token weights and their format are one.

    base: as in the settings; it decides whether and how the moments keep a residual.
    """
    problems = []
    for group in stage:
        columns = layer.get_submodule(group[0]).in_features
        alike: dict[tuple, list[str]] = {}
        for linear in group:
            alike.setdefault((id(weights.get(linear)), format_of(linear)), []).append(linear)
        for linears in map(tuple, alike.values()):
            rows = [layer.get_submodule(linear).out_features for linear in linears]
            format, dtype = format_of(linears[0]), dtype_of(linears[0])
            problem = Problem(linears, rows, format, dtype, None, weights.get(linears[0]))
            known = problem.stacked(layer) if base == "aligned" and is_flat(sum(rows), columns) else None
            problem.moments = Moments(columns, device, base != "gptq", known)
            problems.append(problem)
    return problems


def _clipped(problem: Problem, solver: Solver) -> tuple[bool, ...]:
    """Of each of its linears, whether a solver that rounds may shrink its ranges."""
    return () if solver.compensate else tuple(map(is_clipped, problem.linears))


def is_flat(rows: int, columns: int) -> bool:
    """Whether W D is better summed than D: it is smaller, and up to I/2 rows the sum costs fewer multiplications."""
    return 2 * rows <= columns


def collect(
    problems: list[Problem],
    layer: torch.nn.Module,
    index: int,
    quantized: list[Stream],
    full: list[Stream],
    originals: dict[str, torch.Tensor],
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
            problem.moments.add(inputs, problem.weights[i] if problem.weights else None, targets.get(linear))

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
        weights = stack([problems[i].stacked(layer) for i in numbers])
        h, residuals = zip(*(problems[i].moments.mean() for i in numbers), strict=True)
        residual = None if residuals[0] is None else stack(residuals)
        first = problems[numbers[0]]
        clipped = None
        if not solver.compensate:
            allowed = torch.tensor(_clipped(first, solver), device=weights.device)
            clipped = allowed.repeat_interleave(torch.tensor(first.rows, device=weights.device))
        solutions = solve(weights, stack(h), first.format, first.dtype, solver, residual, clipped)
        found |= dict(zip(numbers, solutions, strict=True))
    return [_exchanged(ranks, i, problem, found.get(i)) for i, problem in enumerate(problems)]


def _alike(problems: list[Problem], numbers: list[int], solver: Solver) -> list[list[int]]:
    """Numbers of problems in batches of one shape and a bounded size."""
    batches: dict[tuple, list[list[int]]] = {}
    for number in numbers:
        shape = problems[number].shape
        found = batches.setdefault((*shape, _clipped(problems[number], solver)), [[]])
        if found[-1] and (len(found[-1]) + 1) * 4 * shape[1] ** 2 > TOGETHER:
            found.append([])
        found[-1].append(number)
    return [numbers for found in batches.values() for numbers in found]


def _exchanged(ranks: Ranks, number: int, problem: Problem, solution: Solution | None) -> Solution:
    """The solution of problem `number` on every rank."""
    if ranks.size == 1:
        return solution
    rows, columns, format, dtype = problem.shape
    shared = solution or Solution.empty(format, rows, columns, dtype, problem.moments.h.device)
    return shared.exchanged(lambda tensor: ranks.broadcast(tensor, ranks.owner(number)))
