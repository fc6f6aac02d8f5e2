"""Rounding in floating point against numpy, its gradient at the bounds against finite differences, and ranges."""

import numpy as np
import pytest
import torch

from benchmarks.qvlm_fake.fake import (
    PERCENTILES,
    by_channel,
    by_token,
    channel_percentiles,
    fake,
    row_ranges,
    token_percentiles,
)
from vlmq_vllm.offline.methods.grid import MSE


@pytest.mark.parametrize("levels", [4, 16, 64, 256])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 11)])
def test_values_take_the_nearest_point_in_the_range(levels, shape):
    x = torch.randn(shape, dtype=torch.float64)
    low, high = torch.full((shape[-1],), -0.7), torch.linspace(0.3, 1.1, shape[-1])
    points = np.linspace(low.double().numpy(), high.double().numpy(), levels)  # [M, C]
    flat = x.reshape(-1, shape[-1]).numpy()
    nearest = np.abs(flat[:, None] - points).argmin(1)
    expected = np.take_along_axis(points, nearest, 0).reshape(shape)
    found = fake(x, low.double(), high.double(), levels).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("levels", [4, 16])
@pytest.mark.parametrize("bound", [0, 1])
def test_the_gradient_of_a_bound_is_that_of_the_function_with_its_rounding_held(levels, bound):
    """What rounding adds to the position is a constant; values that are cut have their true gradient."""
    x = torch.linspace(-2, 3, 101, dtype=torch.float64)
    bounds = [torch.tensor(-1.03, dtype=torch.float64), torch.tensor(1.91, dtype=torch.float64)]
    step = (bounds[1] - bounds[0]) / (levels - 1)
    place = ((x - bounds[0]) / step).clamp(0, levels - 1)
    held = place.round() - place

    def function(moved: float) -> torch.Tensor:
        low, high = (b + moved if i == bound else b for i, b in enumerate(bounds))
        width = (high - low) / (levels - 1)
        return low + width * (((x - low) / width).clamp(0, levels - 1) + held)

    torch.testing.assert_close(function(0), fake(x, *bounds, levels))
    expected = (function(1e-6) - function(-1e-6)) / 2e-6
    bounds[bound].requires_grad_()
    weight = torch.randn(101, dtype=torch.float64)
    (found,) = torch.autograd.grad((fake(x, *bounds, levels) * weight).sum(), bounds[bound])
    torch.testing.assert_close(found, (expected * weight).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("high", [1.0, 2.0, 4.5])
def test_the_gradient_points_to_the_bound_with_the_least_error(high):
    """Of a standard normal at 4 bits: finite differences of the error itself, which has no gradient of the rounding."""
    x = torch.randn(1 << 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def error(high: torch.Tensor) -> torch.Tensor:
        return (fake(x, -high, high, 16) - x).square().mean()

    bound = torch.tensor(high, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(error(bound), bound)
    with torch.no_grad():
        expected = (error(bound + 0.05) - error(bound - 0.05)) / 0.1
    assert torch.sign(found) == torch.sign(expected)


def test_what_is_cut_passes_no_gradient_to_the_value_and_the_rest_all():
    x = torch.tensor([-2.0, -0.2, 0.4, 2.0], requires_grad=True)
    fake(x, torch.tensor(-1.0), torch.tensor(1.0), 16).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize(("tokens", "channels"), [(1, 3), (2, 1), (50, 7), (333, 4)])
def test_percentiles_are_numpys(tokens, channels):
    x = torch.randn(tokens, channels, dtype=torch.float64)
    parts = [x[: tokens // 2][None], x[tokens // 2 :]] if tokens > 1 else [x]
    for share, (low, high) in zip(PERCENTILES, channel_percentiles(parts, PERCENTILES), strict=True):
        np.testing.assert_allclose(low, np.quantile(x.numpy(), 1 - share, axis=0), atol=1e-12)
        np.testing.assert_allclose(high, np.quantile(x.numpy(), share, axis=0), atol=1e-12)
        low, high = token_percentiles(x, share)
        np.testing.assert_allclose(low[:, 0], np.quantile(x.numpy(), 1 - share, axis=1), atol=1e-12)
        np.testing.assert_allclose(high[:, 0], np.quantile(x.numpy(), share, axis=1), atol=1e-12)


def test_channels_in_slices_are_channels_at_once(monkeypatch):
    x = torch.randn(10, 9)
    whole = channel_percentiles([x], (0.9,))
    monkeypatch.setattr("benchmarks.qvlm_fake.fake.COLUMNS", 20)
    torch.testing.assert_close(channel_percentiles([x], (0.9,)), whole)


def test_channels_have_fixed_ranges_and_tokens_their_own():
    x = torch.randn(20, 6)
    (bounds,) = channel_percentiles([x], (1.0,))
    torch.testing.assert_close(by_channel(bounds, 256)(10 * x).amax(0), bounds[1])
    # a token times ten is its rounding times ten, whatever the other tokens are
    torch.testing.assert_close(by_token(1.0, 16)(10 * x)[3], 10 * by_token(1.0, 16)(x[3:4])[0])
    wider = by_token(1.0, 16, torch.tensor([1.0, 0.5]))(x)
    torch.testing.assert_close(wider.amax(1), x.amax(1) * 0.5)


@pytest.mark.parametrize("levels", [16, 64])
def test_rows_have_the_range_with_the_least_error_of_those_tried(levels):
    weight = torch.randn(5, 40, dtype=torch.float64) ** 3
    low, high = row_ranges(weight, levels)
    found = (fake(weight, low, high, levels) - weight).abs().pow(MSE.exponent).sum(1)
    for step in range(MSE.steps + 1):
        shrink = 1 - (1 - MSE.least) * step / MSE.steps
        tried = fake(weight, weight.amin(1, True) * shrink, weight.amax(1, True) * shrink, levels) - weight
        assert (found <= tried.abs().pow(MSE.exponent).sum(1) + 1e-12).all()
    # cubes of normals have tails that are worth cutting where points are few
    assert levels > 16 or (low > weight.amin(1, True)).any()
