"""The column solver against a slow reference in float64, and the properties that make it GPTQ."""

import pytest
import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.gptq import Moments, round_to_nearest, solve
from vlmq_vllm.offline.grid import find_grid, to_codes

FORMAT = WeightFormat(3, 32, False)


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs [tokens, columns] with strongly correlated columns, as activations have."""
    return torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + 0.1 * torch.randn(tokens, columns)


def moments(inputs: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    collected = Moments(inputs.shape[1], inputs.device)
    collected.add(inputs, weights)
    return collected.mean()


def reference(weight, h, format, order, damp):
    """GPTQ as its derivation has it: round a column, spread its error by H^-1, strike the column from H^-1.

    Float64, one column at a time, no Cholesky factor, no blocks; grids found beforehand in file order.
    """
    scale, zero = find_grid(weight, format, torch.bfloat16, search=True)
    group = format.group_of(weight.shape[1])
    w, h = weight.double().clone(), h.double()
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for i in order.tolist():
        s, z = scale[:, group[i]].double(), zero[:, group[i]].double()
        q = to_codes(w[:, i], s, z, format.levels)
        codes[:, i] = q.to(torch.uint8)
        error = (w[:, i] - (q - z) * s) / inverse[i, i]
        w -= torch.outer(error, inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("columns", [40, 128, 300], ids=lambda n: f"{n} columns")
def test_equals_the_reference(columns):
    weight, h = torch.randn(16, columns), moments(correlated(2000, columns))
    order = torch.argsort(h.diagonal(), descending=True)
    solution = solve(weight, h, FORMAT, torch.bfloat16)
    # the same choices but where float32 and float64 round a column that lies between two codes
    same = (solution.weight.codes == reference(weight, h, FORMAT, order, 0.01)).float().mean()
    assert same > 0.995


def test_file_order_equals_the_reference_with_one_group():
    """With a group per row the grid is found before any compensation in both orders."""
    format = WeightFormat(3, -1, False)
    weight, h = torch.randn(16, 200), moments(correlated(2000, 200))
    solution = solve(weight, h, format, torch.bfloat16, act_order=False)
    assert (solution.weight.codes == reference(weight, h, format, torch.arange(200), 0.01)).float().mean() > 0.995


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("format", [WeightFormat(2, 64, True), WeightFormat(3, 32, False), WeightFormat(4, -1, True)])
def test_beats_rounding_on_correlated_inputs(format, act_order):
    weight, h = torch.randn(32, 200), moments(correlated(1000, 200))
    solution = solve(weight, h, format, torch.bfloat16, act_order=act_order)
    rounded = round_to_nearest(weight, format, torch.bfloat16, search=True).dequantize()
    loss = float((((rounded - weight) @ h) * (rounded - weight)).sum() / len(weight))
    assert solution.loss < 0.7 * loss
    error = solution.weight.dequantize() - weight
    assert solution.loss == pytest.approx(float(((error @ h) * error).sum() / 32), rel=1e-4)


def test_uncorrelated_inputs_give_rounding():
    weight = torch.randn(8, 64)
    solution = solve(weight, torch.diag(torch.rand(64) + 0.1), FORMAT, torch.bfloat16)
    assert torch.equal(solution.weight.codes, round_to_nearest(weight, FORMAT, torch.bfloat16, True).codes)


def test_weights_of_a_common_size_change_nothing():
    inputs, weight, lam = correlated(500, 64), torch.randn(8, 64), torch.rand(500)
    once = solve(weight, moments(inputs, lam), FORMAT, torch.bfloat16)
    scaled = solve(weight, moments(inputs, 1024 * lam), FORMAT, torch.bfloat16)  # a power of two is exact
    assert torch.equal(once.weight.codes, scaled.weight.codes)


def test_a_token_of_weight_two_is_the_token_twice():
    inputs = correlated(50, 32)
    lam = torch.ones(50)
    lam[7] = 2
    weighted, doubled = Moments(32, inputs.device), Moments(32, inputs.device)
    weighted.add(inputs, lam)
    doubled.add(torch.cat([inputs, inputs[7:8]]))
    torch.testing.assert_close(weighted.sum, doubled.sum, rtol=1e-5, atol=1e-4)  # sums of 50 products in float32


def test_inputs_that_are_always_zero_are_counted_and_rounded():
    inputs = correlated(500, 64)
    inputs[:, 5] = 0
    weight = torch.randn(8, 64)
    solution = solve(weight, moments(inputs), FORMAT, torch.bfloat16)
    assert solution.dead == 1
    rounded = round_to_nearest(weight, FORMAT, torch.bfloat16, True)
    assert torch.equal(solution.weight.codes[:, 5], rounded.codes[:, 5])


def test_fewer_tokens_than_columns_are_solved_with_the_damping_that_was_asked_for():
    solution = solve(torch.randn(8, 64), moments(torch.randn(3, 64)), FORMAT, torch.bfloat16)
    assert solution.damp == 0.01


def test_damping_grows_until_the_moments_can_be_inverted():
    """One negative eigenvalue of a tenth of the mean diagonal: 0.01 and 0.04 are too little, 0.16 is enough."""
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    values = torch.ones(32)
    values[0] = -0.1
    h = basis @ torch.diag(values) @ basis.T
    solution = solve(torch.randn(8, 32), (h + h.T) / 2, FORMAT, torch.bfloat16)
    assert solution.damp == pytest.approx(0.16)


@pytest.mark.parametrize("h", [torch.zeros(32, 32), torch.full((32, 32), float("nan"))], ids=["zero", "nan"])
def test_moments_without_use_give_rounding_and_say_so(h):
    weight = torch.randn(4, 32)
    solution = solve(weight, h, FORMAT, torch.bfloat16)
    assert solution.damp is None
    assert torch.equal(solution.weight.codes, round_to_nearest(weight, FORMAT, torch.bfloat16, True).codes)
