"""Memory of solving a stage of linears: their Hessians, and what the solver needs beside them.

Each term names the code whose tensors it counts. Sizes are in bytes.
"""

import re
from dataclasses import dataclass, field

from vlmq_vllm.names import FUSED
from vlmq_vllm.offline.methods.gptq.factor import STRIP
from vlmq_vllm.offline.methods.gptq.problem import TOGETHER, is_flat
from vlmq_vllm.offline.plan.sizes import FLOAT

SHARED = (FUSED["qkv_proj"], FUSED["gate_up_proj"])  # read one input: without token weights one problem


@dataclass(frozen=True)
class Solve:
    """A problem of `methods/gptq/problem.py`: rows (of all its linears together) and columns."""

    rows: int
    columns: int

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
    """A stage of `model/groups.py`: its problems, and from how many groups (experts) they come."""

    problems: list[Solve] = field(default_factory=list)
    groups: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all its weights in float32."""
        return sum(problem.weight for problem in self.problems)


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
        # one stage for the same group of every expert
        stage = stages.setdefault(tuple(re.sub(r"\.\d+\.", ".*.", name) for name in names), Stage())
        stage.groups += 1
        plain = [name for name in names if name not in apart]
        for members in [*([name] for name in names if name in apart), plain]:
            if members:
                stage.problems.append(Solve(sum(shapes[name][0] for name in members), shapes[members[0]][1]))
    return list(stages.values())


def moments_bytes(problems: list[Solve], base: str) -> int:
    """Hessians of all problems of a stage (`Moments.h`), and `Moments.residual` where the base asks for it."""
    total = sum(problem.square for problem in problems)
    return total if base == "gptq" else total + sum(_residual_bytes(problem, base) for problem in problems)


def working_bytes(problems: list[Solve], base: str, exact: bool, ordered: bool) -> int:
    """Greatest need of `solve_all`: problems of one shape are solved as one batch of at most TOGETHER bytes.

    exact: on a CPU, factors in float64. ordered: columns are treated in an order of their own.
    """
    solved = most = 0  # codes of the batches before
    for problem in dict.fromkeys(problems):
        left, together = problems.count(problem), max(1, TOGETHER // problem.square)
        while left > 0:
            count = min(left, together)
            most = max(most, solved + _batch_bytes(problem, count, base, exact, ordered))
            solved += count * problem.rows * problem.columns
            left -= count
    return most


def _residual_bytes(problem: Solve, base: str) -> int:
    """D, or W D where "qep" sums that and it is smaller."""
    return problem.weight if base == "qep" and is_flat(problem.rows, problem.columns) else problem.square


def _batch_bytes(problem: Solve, count: int, base: str, exact: bool, ordered: bool) -> int:
    """`solve` of `count` problems: the weights and copies that it is given, and its greediest step."""
    square, weight, several = count * problem.square, count * problem.weight, count > 1
    pushed, moved = base == "gptaq", base == "qep"
    drift = count * _residual_bytes(problem, base)
    given = weight + (square + (drift if pushed or moved else 0) if several else 0)  # several are stacked
    factors = 2 * square if several else square  # they are stacked, the list of them stays
    # targets, owed and for a push the values, all transposed weights; codes in order, scattered and as bytes of rows
    columns = weight * (3 if pushed else 2) + 3 * weight // FLOAT
    steps = [_factor_bytes(problem, exact) + square - problem.square]  # beside the factors that are ready
    if pushed:  # it works in place of D, or of its permuted copy
        strips = 2 * count * FLOAT * min(STRIP, problem.columns) * problem.columns
        steps.append(factors + (max(strips + square, 3 * square) if ordered else strips))
        columns += square if ordered else 0
    if moved:
        steps.append(factors + 3 * drift + 2 * weight)
        columns += weight
    return given + max(*steps, factors + columns)


def _factor_bytes(problem: Solve, exact: bool) -> int:
    """`find_factor`. exact: H in float64 and its factor in the same place, then in float32; else H in the order of
    treatment and its factor."""
    strips = FLOAT * 2 * min(STRIP, problem.columns) * problem.columns
    return 2 * problem.square + (max(problem.square, strips) if exact else 0)
