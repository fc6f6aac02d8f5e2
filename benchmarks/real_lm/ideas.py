"""Ideas that are not in the product, each as one function that stands for one of the product's.

Qronos' order of correction (2505.11695) is none of them, for the product has it. It seeks codes for the least
|W F - Q X|^2, gives the present column its best value with the later ones as they are, rounds it, and solves the later
ones anew for the same targets. From the second column on the later ones are already the best for the columns before, so
that the best value of the present one, with them as they are, is the one it has: what is rounded is the solution of
least squares given the columns before. So it is in GPTQ behind QEP's move, for with T = W + W D H^-1 and H = X X^T

    |W F - Q X|^2 = (T - Q) H (T - Q)^T + a constant,

and GPTQ's step is the solution of that given the columns before. Only the first column differs: Qronos rounds it with W
behind it, GPTQ with T. A damping a is the term a |Q - W|^2 on both sides if Qronos adds a to H and to F X^T.
`tests/benchmarks/test_tried.py` checks it with numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from free_values import solve_free

from vlmq_vllm.offline.methods.gptq import problem
from vlmq_vllm.offline.model import rotation

WRITERS = ("o_proj", "down_proj")


def hadamard(size: int) -> torch.Tensor:
    """A matrix of signs [size, size] with orthogonal rows: Kronecker products of Paley's order 12 and Sylvester's 2."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 12 == 0:
        return torch.kron(_paley(), hadamard(size // 12))
    assert size % 2 == 0, f"no Hadamard matrix of order {size} is made here"
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard(size // 2))


def _paley() -> torch.Tensor:
    """Of order 12: I + S with the signs of quadratic residues modulo 11."""
    residues = {i * i % 11 for i in range(1, 11)}
    signs = torch.tensor([0.0 if i == 0 else 1.0 if i in residues else -1.0 for i in range(11)], dtype=torch.float64)
    places = torch.arange(11)
    skew = torch.zeros(12, 12, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, signs[(places[:, None] - places) % 11]
    return skew + torch.eye(12)


def random_hadamard(size: int, generator: torch.Generator) -> torch.Tensor:
    """Stands for `rotation.random_orthogonal`: QuaRot's (2404.00456), random signs before a Hadamard matrix."""
    signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1
    return signs * hadamard(size) / size**0.5


def alphas(share: Callable[[str], float], original: Callable = problem._solve_together) -> Callable:
    """Stands for `problem._solve_together`: the share of the residual by the name of the linear."""

    def solve_together(problems, layer, solver):
        return original(problems, layer, replace(solver, alpha=share(problems[0].linears[0])))

    return solve_together


def writers(alpha: float, others: float = 1.0) -> Callable:
    return alphas(lambda linear: alpha if linear.endswith(WRITERS) else others)


@dataclass(frozen=True)
class Idea:
    """Settings beside QEP's, what is replaced (a module, a name in it and what stands there), and the baseline."""

    settings: dict = field(default_factory=dict)
    replaced: tuple[Any, str, Any] | None = None
    against: str = "QEP"


FREE, HADAMARD = (problem, "solve", solve_free), (rotation, "random_orthogonal", random_hadamard)
ROTATE, REFINE = {"rotate": True}, {"refine": 2}
IDEAS = {
    "QEP": Idea(),
    "QEP, refined": Idea(REFINE),
    "QEP, rotated": Idea(ROTATE),
    "QEP, rotated, refined": Idea(ROTATE | REFINE),
    "free values": Idea({}, FREE, "QEP, refined"),
    "free values, rotated": Idea(ROTATE, FREE, "QEP, rotated, refined"),
    "Hadamard": Idea(ROTATE, HADAMARD, "QEP, rotated"),
    "Hadamard, refined": Idea(ROTATE | REFINE, HADAMARD, "QEP, rotated, refined"),
    "alpha 0.5 for writers": Idea({}, (problem, "_solve_together", writers(0.5))),
    "alpha 0.25 for writers": Idea({}, (problem, "_solve_together", writers(0.25))),
    "alpha 0.5 for readers": Idea({}, (problem, "_solve_together", writers(1.0, 0.5))),
    "alpha 0.25 for readers": Idea({}, (problem, "_solve_together", writers(1.0, 0.25))),
}
