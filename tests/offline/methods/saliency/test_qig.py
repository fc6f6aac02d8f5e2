"""Integrated gradients of small modules: closed forms, completeness; token weights against numpy."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from coarse_rounding import completeness
from vlmq_vllm.offline.methods.saliency.qig import input_of, integrated_gradients, token_weights
from vlmq_vllm.offline.model.layers import holding, weights_of


@contextmanager
def weighing(linear, weight):
    """The linear with another weight."""
    before, linear.weight = linear.weight, torch.nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = before


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(1, 3, 1), (5, 7, 11), (9, 33, 4)])
def test_a_linear_alone_has_a_closed_form(tokens, inner, outer):
    """|dW z| is linear along a path from 0: IG_tc = x_tc mean_h sign(dW_h x_t) dW_hc for any number of points."""
    linear = torch.nn.Linear(inner, outer).requires_grad_(False)
    rounded = (8 * linear.weight).round() / 8
    x = torch.randn(1, tokens, inner)
    delta = linear.weight - rounded
    expected = x[0] * (torch.sign(x[0] @ delta.T) @ delta / outer)
    for steps in (1, 6):
        found = integrated_gradients(linear, lambda: weighing(linear, rounded), ((x,), {}), None, steps)
        # the error is a difference of two products, with their rounding
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_path_between_two_inputs_of_a_linear():
    """Where no error changes its sign on the way, the same with x1 - x0 in front."""
    linear = torch.nn.Linear(6, 9, bias=False).double().requires_grad_(False)
    rounded = (4 * linear.weight).round() / 4
    end = torch.randn(1, 4, 6, dtype=torch.float64)
    start, delta = 0.5 * end, linear.weight - rounded
    expected = 0.5 * end[0] * (torch.sign(end[0] @ delta.T) @ delta / 9)
    found = integrated_gradients(linear, lambda: weighing(linear, rounded), ((end,), {}), start, 3)
    torch.testing.assert_close(found, expected.float())


class Gated(torch.nn.Module):
    """A gated MLP [.., 5] -> [.., 5] whose input may be given by name."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(5, 12), torch.nn.Linear(5, 12)
        self.down_proj = torch.nn.Linear(12, 5)

    def forward(self, hidden_states):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("from_zero", [False, True])
def test_gradients_of_an_mlp_sum_up_to_the_difference(named, from_zero):
    """K midpoints of g' on [0, 1] miss at most V / 2K of its integral, V being the total variation of g', kinks of | |
    included; g' is worked out here by differences of F along the path.
    """
    mlp = Gated().double().requires_grad_(False)
    x = 2 * torch.randn(2, 7, 5, dtype=torch.float64)
    start = None if from_zero else x + 0.5 * torch.randn_like(x)
    call = ((), {"hidden_states": x}) if named else ((x,), {})
    rounded = {name: (4 * weight).round() / 4 for name, weight in weights_of(mlp).items()}
    lacking = {}
    for steps in (1, 8, 128):
        found = integrated_gradients(mlp, lambda: holding(mlp, rounded), call, start, steps)
        assert found.shape == (14, 5) and found.dtype == torch.float32
        lacking[steps] = completeness(mlp, lambda: holding(mlp, rounded), call, found, start)
    assert input_of(call) is x and x.grad is None

    def distance(a):
        z = torch.lerp(torch.zeros_like(x) if from_zero else start, x, a)
        with holding(mlp, rounded):
            other = mlp(z)
        return (mlp(z) - other).abs().mean(-1).sum()

    path = torch.stack([distance(i / 1000) for i in range(1001)])
    variation = float(path.diff().mul(1000).diff().abs().sum())
    assert all(abs(lack) < 1.02 * variation / (2 * steps) for steps, lack in lacking.items())  # 2%: 1000 differences
    moved = float(path[-1] - path[0])
    assert abs(lacking[128]) < 1e-3 * abs(moved)
    assert float(found.double().sum()) - moved == pytest.approx(lacking[128], abs=1e-9)


@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (1, 40), (3, 17)])
@pytest.mark.parametrize("power", [-1, 0.01])  # heavy tails, and scores so alike that the lower bound binds too
def test_weights_are_capped_by_numpys_quartiles(samples, tokens, power):
    gradients = torch.randn(samples * tokens, 6).sign() * torch.rand(samples * tokens, 1).pow(power)
    weights, silent = token_weights(gradients, samples)
    capped = raised = 0
    for i, own in enumerate(weights.view(samples, tokens)):
        u = gradients.view(samples, tokens, 6)[i].abs().mean(-1).double().numpy()
        u /= u.sum()
        low, high = np.quantile(u, (0.25, 0.75))
        expected = np.clip(u, low - 1.5 * (high - low), high + 1.5 * (high - low))
        capped, raised = capped + (expected < u).sum(), raised + (expected > u).sum()
        torch.testing.assert_close(own, torch.tensor(expected / expected.sum()).float())
    assert weights.dtype == torch.float32 and not silent.any()
    assert tokens == 1 or (capped if power < 0 else raised) > 0


def test_samples_without_a_signal_count_alike():
    gradients = torch.ones(12, 2)
    gradients[:4] = 0
    gradients[5] = float("nan")
    gradients[9] = 3
    weights, silent = token_weights(gradients, 3)
    assert silent.tolist() == [True, True, False]
    torch.testing.assert_close(weights[:8], torch.full((8,), 0.25))
    capped = torch.tensor([1, 2.25, 1, 1])  # the quartiles of 1 3 1 1 are 1 and 1.5
    torch.testing.assert_close(weights[8:], capped / capped.sum())
