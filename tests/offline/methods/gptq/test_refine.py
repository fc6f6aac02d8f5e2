"""New scales and codes for solved weights, against least squares and exhaustive search in float64."""

import pytest
import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.methods.gptq import refine as module
from vlmq_vllm.offline.methods.gptq.refine import refine
from vlmq_vllm.offline.methods.gptq.solve import Solver, round_to_nearest, solve

FORMATS = [WeightFormat(2, 32, False), WeightFormat(3, 32, True), WeightFormat(4, -1, False), WeightFormat(2, 16, True)]
DAMP = 0.05


def problem(rows=24, columns=75):
    """Weights [rows, columns] and a Hessian of inputs whose columns are correlated; the last group is a short one."""
    inputs = torch.randn(400, 20) @ torch.randn(20, columns) + 0.3 * torch.randn(400, columns)
    return torch.randn(rows, columns), inputs.T @ inputs / 400


def damped(h):
    return h.double() + DAMP * torch.eye(len(h), dtype=torch.float64)


def cost(weight, target, h):
    error = target.double() - weight.dequantize(torch.float32).double()
    return ((error @ damped(h)) * error).sum(1)


def nearest(target, format, dtype=torch.float32):
    return round_to_nearest(target, format, dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rounds_never_raise_the_cost_and_tell_what_is_left(format):
    target, h = problem()
    weight = nearest(target, format, torch.bfloat16)
    costs = [cost(weight, target, h)]
    for rounds in (1, 2, 4):
        refined, told = refine(target, h, DAMP, weight, rounds)
        costs.append(cost(refined, target, h))
        torch.testing.assert_close(told.double(), costs[-1], rtol=1e-3, atol=0)  # float32 sums
        assert refined.scale.dtype == torch.bfloat16 and refined.codes.dtype == torch.uint8
        assert int(refined.codes.max()) < format.levels and bool((refined.scale > 0).all())
        assert refined.zero is weight.zero
    for before, after in zip(costs, costs[1:], strict=False):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(costs[1].sum()) < 0.7 * float(costs[0].sum())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_scales_are_those_of_least_squares(format, monkeypatch):
    """sum_g s_g c_g against the targets, both times a factor of H."""
    monkeypatch.setattr(module._Rows, "_choose_codes", lambda self, pull: None)
    monkeypatch.setattr(module, "RIDGE", 0.0)
    target, h = problem()
    weight = nearest(target, format)
    refined, _ = refine(target, h, DAMP, weight, 1)
    factor = torch.linalg.cholesky(damped(h))
    group = format.group_of(h.shape[0])
    zero = format.middle if weight.zero is None else weight.zero.double()[:, group]
    steps = weight.codes.double() - zero
    masks = torch.nn.functional.one_hot(group).double()  # [I, G]
    basis = (steps[:, :, None] * masks).transpose(1, 2) @ factor  # [O, G, I]
    best = torch.linalg.lstsq(basis.transpose(1, 2), (target.double() @ factor)[..., None]).solution[..., 0]
    positive = (best > 0).all(1)
    assert positive.sum() > 20
    torch.testing.assert_close(refined.scale[positive].double(), best[positive], rtol=1e-3, atol=1e-5)
    assert torch.equal(refined.scale[~positive], weight.scale[~positive])


def test_no_other_code_of_one_column_is_better_in_the_end(monkeypatch):
    """After enough rounds every single change of a code costs more, tried one by one."""
    monkeypatch.setattr(module._Rows, "_best_scales", lambda self, wanted: self.scale.clone())
    format = FORMATS[0]
    target, h = problem(rows=3, columns=40)
    weight, _ = refine(target, h, DAMP, nearest(target, format), 30)
    least = cost(weight, target, h)
    for column in range(40):
        for code in range(format.levels):
            changed = weight.codes.clone()
            changed[:, column] = code
            other = QuantizedWeight(format, changed, weight.scale, weight.zero)
            assert bool((cost(other, target, h) >= least * (1 - 1e-5)).all())


def test_rows_in_chunks_are_the_same_rows(monkeypatch):
    target, h = problem()
    weight = nearest(target, FORMATS[0])
    whole, _ = refine(target, h, DAMP, weight, 2)
    monkeypatch.setattr(module, "CPU_CHUNK", 75 * 5)
    parts, _ = refine(target, h, DAMP, weight, 2)
    assert float((whole.codes == parts.codes).float().mean()) > 0.99  # sums in another order decide between equals
    torch.testing.assert_close(parts.scale, whole.scale, rtol=0.05, atol=0)


def test_groups_without_steps_and_columns_without_inputs_keep_their_scales():
    format = WeightFormat(2, 16, True)
    target, h = problem(columns=64)
    target[:, 16:32] = 0
    h[32:48], h[:, 32:48] = 0, 0
    weight = nearest(target, format)
    refined, _ = refine(target, h, DAMP, weight, 3)
    assert refined.scale.isfinite().all()
    assert float(refined.dequantize(torch.float32)[:, 16:32].abs().max()) < 1
    assert bool((cost(refined, target, h) <= cost(weight, target, h)).all())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("qep", [True, False])
def test_a_solver_that_refines_starts_from_gptqs_solution(act_order, qep):
    """Its loss is that of the moved targets, and smaller than that of the solution it starts from."""
    weights, h = problem()
    residual = 0.1 * torch.randn(1, 75, 75) if qep else None
    options = {"act_order": act_order, "qep": qep, "alpha": 1.0}
    plain, refined = (
        solve(weights[None], h[None], FORMATS[0], torch.bfloat16, Solver(refine=n, **options), residual)[0]
        for n in (0, 2)
    )
    assert refined.damp == plain.damp and refined.dead == plain.dead
    assert bool((refined.loss <= plain.loss * (1 + 1e-4)).all())
    assert float(refined.loss.sum()) < 0.8 * float(plain.loss.sum())
    counted = h + plain.damp * h.diagonal().mean() * torch.eye(75)
    target = weights if residual is None else weights + weights @ residual[0] @ torch.linalg.inv(counted)
    error = target - refined.weight.dequantize(torch.float32)
    expected = ((error @ counted) * error).sum(1)
    torch.testing.assert_close(refined.loss, expected, rtol=1e-2, atol=0)
