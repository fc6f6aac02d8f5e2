"""Scales and zero points: bounds that follow from the definition, and what the search gains."""

import pytest
import torch

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import MINMAX, MSE, GridSearch, find_grid

FORMATS = [WeightFormat(bits, group, sym) for bits in (2, 3, 4) for group in (32, -1) for sym in (True, False)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_minmax_grid_reaches_every_weight(format):
    weight = torch.randn(9, 75)
    rounded = round_to_nearest(weight, format, torch.float32, search=MINMAX)
    scale = rounded.scale[:, format.group_of(75)]
    # half a step; a symmetric grid ends one step earlier above than below, so its largest weight is off by half more
    bound = scale * (1.0 if format.symmetric else 0.5) + 1e-6
    error = (rounded.dequantize() - weight).abs()
    # rounding the zero point to an integer can push an asymmetric grid's ends off by half a step more
    assert (error <= (bound if format.symmetric else 2 * bound)).all()
    assert rounded.codes.max() < format.levels


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_search_never_loses_in_its_own_measure(format):
    weight = torch.randn(9, 75) ** 3
    errors = [
        (round_to_nearest(weight, format, torch.bfloat16, search).dequantize() - weight).abs().pow(2.4).sum()
        for search in (MSE, MINMAX)
    ]
    assert errors[0] < errors[1]


def test_search_finds_the_grid_that_the_weights_lie_on():
    """4095 weights of -0.5, 0 and 0.5 and one outlier of 1.5: at 2 bits the many are worth more than the one."""
    format = WeightFormat(2, -1, True)
    weight = 0.5 * (torch.arange(4096.0).remainder(3) - 1)[None]
    weight[0, 5] = 1.5
    searched, ranged = (round_to_nearest(weight, format, torch.bfloat16, s).dequantize() for s in (MSE, MINMAX))
    assert (searched == weight).sum() == 4095
    assert (ranged == weight).sum() < 4095


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_what_will_be_stored(dtype):
    scale, zero = find_grid(torch.randn(4, 64), WeightFormat(3, 32, False), dtype, search=MSE)
    assert scale.dtype == dtype and zero.dtype == torch.uint8
    assert scale.shape == zero.shape == (4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_weights_are_not_lost(dtype):
    """Steps of 6e-5 are at the lower end of float16's normal numbers; the error is that of 3 bits all the same."""
    weight = 1e-4 * torch.randn(64, 64)
    rounded = round_to_nearest(weight, WeightFormat(3, 32, False), dtype, search=MINMAX).dequantize()
    assert (rounded - weight).norm() / weight.norm() < 0.25


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_groups_without_range_are_exact_zeros(value):
    rounded = round_to_nearest(torch.full((3, 64), value), WeightFormat(2, 32, False), torch.float16, search=MSE)
    assert (rounded.scale > 0).all()
    assert torch.equal(rounded.dequantize(), torch.zeros(3, 64))


def test_search_weighs_columns_by_their_importance():
    """Of two halves of a group the important one decides the step: its weights are met more closely."""
    weight = torch.cat([0.2 * torch.randn(64, 32), torch.randn(64, 32)], 1)
    importance = torch.ones(64)
    importance[:32] = 1000
    format, plain = WeightFormat(2, 64, False), GridSearch(exponent=2)
    scales = [
        find_grid(weight, format, torch.float32, search, importance)
        for search in (plain, GridSearch(exponent=2, importance=True))
    ]
    errors = []
    for scale, zero in scales:
        codes = (weight / scale + zero).round().clamp(0, 3)
        errors.append((scale * (codes - zero) - weight).square()[:, :32].sum())
    assert errors[1] < 0.5 * errors[0]
    alike = find_grid(weight, format, torch.float32, GridSearch(exponent=2, importance=True), torch.ones(64))
    assert torch.equal(alike[0], scales[0][0])
