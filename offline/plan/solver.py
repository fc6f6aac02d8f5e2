"""Memory of solving a stage of linears: their Hessians, and what the solver needs beside them.

Each term names the code whose tensors it counts. Sizes are in bytes.
"""

import re
from collections import Counter
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

    @property
    def residual(self) -> int:
        """Bytes of D, or of W D where that is summed since it is smaller."""
        return self.weight if is_flat(self.rows, self.columns) else self.square


@dataclass
class Stage:
    """A stage of `model/groups.py`: its problems, and from how many groups (experts) they come."""

    problems: list[Solve] = field(default_factory=list)
    groups: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all its weights in float32."""
        return sum(problem.weight for problem in self.problems)

    def moments(self, residual: bool) -> int:
        """Hessians of all problems (`Moments.h`), and `Moments.residual`."""
        return sum(problem.square + (problem.residual if residual else 0) for problem in self.problems)

    def working(self, residual: bool, exact: bool) -> int:
        """Greatest need of `solve_all`: problems of one shape are solved as batches of at most TOGETHER bytes, beside
        the codes of the others. exact: on a CPU, factors in float64."""
        batches = {one: min(count, max(1, TOGETHER // one.square)) for one, count in Counter(self.problems).items()}
        codes = self.weights // FLOAT if len(self.problems) > 1 else 0
        return codes + max(_batch_bytes(one, count, residual, exact) for one, count in batches.items())


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


def _batch_bytes(problem: Solve, count: int, residual: bool, exact: bool) -> int:
    """`solve` of `count` problems: the weights and copies that it is given, and its greediest step."""
    square, weight = count * problem.square, count * problem.weight
    drift = count * problem.residual if residual else 0
    given = weight + (square + drift if count > 1 else 0)  # several are stacked
    factors = 2 * square if count > 1 else square  # they are stacked, the list of them stays
    # targets and owed, transposed weights, and moved ones; codes in order, scattered and as bytes of rows
    columns = weight * (3 if residual else 2) + 3 * weight // FLOAT
    moved = 3 * drift + 2 * weight if residual else 0
    return given + max(_factor_bytes(problem, exact) + square - problem.square, factors + max(columns, moved))


def _factor_bytes(problem: Solve, exact: bool) -> int:
    """`find_factor`. exact: H in float64 and its factor in the same place, then in float32; else H in the order of
    treatment and its factor."""
    strips = FLOAT * 2 * min(STRIP, problem.columns) * problem.columns
    return 2 * problem.square + (max(problem.square, strips) if exact else 0)
