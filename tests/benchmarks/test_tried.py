"""The mathematics of `benchmarks/real_lm/tried.py`: free values, Hadamard matrices, Qronos' order of correction."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmark_modules import FOLDER
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods.gptq.solve import Solver, solve

sys.path.insert(0, f"{FOLDER}/real_lm")
import free_values  # noqa: E402
import ideas  # noqa: E402

SOLVER = Solver(act_order=False, qep=True, alpha=1.0)


def problem(rows=24, columns=96, tokens=4000):
    """W [O, I], H [I, I], D [I, I] of two streams, float32."""
    torch.manual_seed(0)
    full = torch.randn(tokens, columns) @ (0.1 * torch.randn(columns, columns) + torch.eye(columns))
    seen = full + 0.2 * torch.randn(tokens, columns)
    return torch.randn(rows, columns), seen.T @ seen / tokens, (full - seen).T @ seen / tokens


@pytest.mark.parametrize("group_size", [-1, 64])
def test_free_values_cost_less_than_a_refined_grid(group_size):
    w, h, d = problem()
    format = WeightFormat(2, group_size, False)
    free = free_values.solve_free(w[None], h[None], format, torch.bfloat16, SOLVER, d[None].clone())[0]
    grid = solve(w[None], h[None], format, torch.bfloat16, replace(SOLVER, refine=2), d[None].clone())[0]
    assert free.loss.sum() < grid.loss.sum()
    parts = free.split([8, 16])
    assert torch.equal(torch.cat([part.weight.served() for part in parts]), free.weight.served())
    groups = free.weight.served().split(format.width(96), 1)
    assert max(len(row.unique()) for group in groups for row in group) <= 4


def test_no_other_values_are_better_for_the_codes():
    """The gradient of the cost by every value is zero up to the ridge."""
    w, h, _ = problem()
    format = WeightFormat(2, 64, False)
    descent = free_values.Descent(w.T.contiguous(), h, format, torch.float32)
    codes = torch.randint(4, (96, 24))
    values = descent._best_values(h @ w.T, torch.zeros(2, 4, 24), codes)
    values.requires_grad_()
    descent._state(values, codes)[1].sum().backward()
    assert values.grad.abs().max() < 1e-3 * (h @ w.T).abs().sum(0).max()


@pytest.mark.parametrize("size", [64, 256, 576])
def test_a_random_hadamard_matrix_is_orthogonal(size):
    found = ideas.random_hadamard(size, torch.Generator().manual_seed(1))
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.abs(), torch.full_like(found, size**-0.5))


def qronos(w, h, d, damp, scale, zero, first):
    """Codes [O, I] in Qronos' order with a grid for each row [O, 1], float64. first: codes of the first column, or None
    for its own."""
    h = h + damp * torch.eye(len(h))
    wanted = w @ (h + d)  # W F X^T, damped
    rest, codes = w.clone(), torch.zeros_like(w)
    rounded = torch.zeros_like(w)
    for k in range(w.shape[1]):
        others = torch.cat([rounded[:, :k], rest[:, k + 1 :]], 1)
        kept = [i for i in range(w.shape[1]) if i != k]
        best = (wanted[:, k] - others @ h[kept, k]) / h[k, k]
        own = (best[:, None] / scale + zero).round().clamp(0, 3)[:, 0]
        codes[:, k] = first if k == 0 and first is not None else own
        rounded[:, k] = ((codes[:, k, None] - zero) * scale)[:, 0]
        later = slice(k + 1, None)
        left = wanted[:, later] - rounded[:, : k + 1] @ h[: k + 1, later]
        rest[:, later] = torch.linalg.solve(h[later, later], left.T).T
    return codes


def test_qronos_order_gives_the_codes_of_gptq_behind_qep():
    w, h, d = problem()
    found = solve(w[None], h[None], WeightFormat(2, -1, False), torch.float32, SOLVER, d[None].clone())[0]
    weight, damp = found.weight, found.damp * float(h.diagonal().mean())
    grid = weight.scale.double(), weight.zero.double()
    theirs = qronos(w.double(), h.double(), d.double(), damp, *grid, weight.codes[:, 0].double())
    assert (theirs != weight.codes).sum() <= 2  # ties, which the product decides in single precision
    own = qronos(w.double(), h.double(), d.double(), damp, *grid, None)
    same = own[:, 0] == weight.codes[:, 0]
    assert same.float().mean() > 0.5
    assert (own[same] != weight.codes[same]).sum() <= 2
