"""Memory of a stage of linears: its second moments, and what the solver needs beside them.

Each term names the code whose tensors it counts. c is a weight's number of columns, r its rows; sizes are in bytes.
"""

import re
from dataclasses import dataclass, field

from vlmq_vllm.names import FUSED
from vlmq_vllm.offline.methods.gptq.factor import STRIP
from vlmq_vllm.offline.methods.gptq.problem import TOGETHER, is_flat
from vlmq_vllm.offline.methods.grid import BLOCKS_CHUNK
from vlmq_vllm.offline.plan.memory.load import FLOAT

ROUNDING = 4  # float32 tensors of a weight's size at once where it is rounded to nearest
CLIPPING = 5  # the same of a slice of it while ranges are searched with blocks of H
SHARED = (FUSED["qkv_proj"], FUSED["gate_up_proj"])  # read one input: without token weights one problem


@dataclass(frozen=True)
class Solve:
    """A problem of `problems.Problem`: rows (of all its linears together), columns, and how many linears it has."""

    rows: int
    columns: int
    linears: int = field(default=1, compare=False)

    @property
    def square(self) -> int:
        """Bytes of H in float32."""
        return FLOAT * self.columns**2

    @property
    def weight(self) -> int:
        """Bytes of the weight in float32."""
        return FLOAT * self.rows * self.columns


@dataclass
class Stage:
    """A stage of `stages.find_stages`: its problems, and whether they come from more than one group (experts)."""

    problems: list[Solve]
    several: bool = False


def stages_of(shapes: dict[str, tuple[int, int]], apart: set[str]) -> list[Stage]:
    """Stages of a layer's linears (name -> [rows, columns]), as `find_stages` and `find_problems` make them.

    apart: linears with token weights that no other has; those that share theirs with a group, or have none, are one
    problem with it. They see in a forward pass which linears share an input; here their names tell.
    """
    groups: dict[tuple, list[str]] = {}
    for name in shapes:
        parent, _, leaf = name.rpartition(".")
        shared = next((i for i, leaves in enumerate(SHARED) if leaf in leaves), leaf)
        groups.setdefault((parent, shared), []).append(name)
    stages: dict[tuple[str, ...], Stage] = {}
    for names in groups.values():
        key = tuple(re.sub(r"\.\d+\.", ".*.", name) for name in names)  # one stage for the same group of every expert
        plain = [name for name in names if name not in apart]
        problems = [[name] for name in names if name in apart] + ([plain] if plain else [])
        found = [
            Solve(sum(shapes[name][0] for name in members), shapes[members[0]][1], len(members)) for members in problems
        ]
        if key in stages:
            stages[key] = Stage(stages[key].problems + found, True)
        else:
            stages[key] = Stage(found)
    return list(stages.values())


def moments_bytes(stage: list[Solve], base: str) -> int:
    """`Moments.h`, and `Moments.residual` where the base asks for it, of all problems of a stage."""
    total = sum(problem.square for problem in stage)
    if base == "gptq":
        return total
    flat = [base == "aligned" and is_flat(problem.rows, problem.columns) for problem in stage]
    return total + sum(p.weight if is_small else p.square for p, is_small in zip(stage, flat, strict=True))


def working_bytes(stage: list[Solve], base: str, exact: bool, ordered: bool) -> int:
    """Greatest need of `problems.solve_all`: problems of one shape are solved as one batch of at most TOGETHER bytes.

    ordered: columns are treated in an order of their own.
    """
    solved = 0  # codes of the batches before
    most = 0
    for problem, count in _batches(stage):
        most = max(most, solved + _batch_bytes(problem, count, base, exact, ordered))
        solved += count * problem.rows * problem.columns
    return most


def rounding_bytes(stage: list[Solve]) -> int:
    """The same for a solver that does not compensate: weights (and H of several) stacked, one of them being rounded."""
    solved = most = 0
    for problem, count in _batches(stage):
        stacked = count * (problem.weight + (problem.square if count > 1 else 0))
        clipping = CLIPPING * FLOAT * min(BLOCKS_CHUNK, problem.rows * problem.columns)
        most = max(most, solved + stacked + max(ROUNDING * problem.weight, clipping))
        solved += count * problem.rows * problem.columns
    return most


def _batches(stage: list[Solve]) -> list[tuple[Solve, int]]:
    """`problems._alike`: (shape, number of problems) of every batch."""
    found = []
    for problem in dict.fromkeys(stage):
        left, most = stage.count(problem), max(1, TOGETHER // problem.square)
        while left > 0:
            found.append((problem, min(left, most)))
            left -= most
    return found


def _batch_bytes(problem: Solve, count: int, base: str, exact: bool, ordered: bool) -> int:
    """`gptq.solve` of `count` problems: the weights and copies that it is given, and its greediest step."""
    square, weight = count * problem.square, count * problem.weight
    stacked = square if count > 1 else 0
    drift = weight if is_flat(problem.rows, problem.columns) else square  # of "aligned"
    given = weight + stacked + ({"gptaq": square, "aligned": drift}.get(base, 0) if count > 1 else 0)
    steps = [_factor_bytes(problem, exact) + square - problem.square]  # beside the factors that are ready
    # several factors are stacked, the list of them stays; `push_of` works in place of D, or of its permuted copy
    factors = square * (2 if count > 1 else 1)
    pushed = base == "gptaq"
    if pushed:
        strips = 2 * count * FLOAT * min(STRIP, problem.columns) * problem.columns
        steps.append(factors + (max(strips + square, 3 * square) if ordered else strips))
    # targets, owed and for a push the values, all transposed weights; codes in order, scattered and as bytes of rows
    sweep = weight * (3 if pushed else 2) + 3 * weight // FLOAT
    moved = weight if base == "aligned" else 0
    if moved:
        steps.append(factors + 3 * drift + 2 * weight)
    steps.append(factors + (square if pushed and ordered else 0) + moved + sweep)
    return given + max(steps)


def _factor_bytes(problem: Solve, exact: bool) -> int:
    """`factor.find_factor`. exact: on a CPU, H in float64 and its factor in the same place, then in float32; else H in
    the order of treatment and its factor."""
    strips = FLOAT * 2 * min(STRIP, problem.columns) * problem.columns
    return 2 * problem.square + (max(problem.square, strips) if exact else 0)
