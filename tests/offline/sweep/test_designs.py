"""Designs, fronts, importances and budgets of the component study on made-up data whose right answer is known."""

import ctypes
import itertools
import random

import numpy as np
import pytest

from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.offline.sweep import forest as forests
from vlmq_vllm.offline.sweep import knapsack
from vlmq_vllm.offline.sweep.designs import find_design, full_grid, one_at_a_time, random_sample
from vlmq_vllm.offline.sweep.forest import check_forest, find_rises, fit_forests
from vlmq_vllm.offline.sweep.knapsack import Choice, allocate, check_solver, isotonic
from vlmq_vllm.offline.sweep.pareto import pareto_front


def test_one_at_a_time_changes_one_part_or_all():
    assert one_at_a_time(2, (2, 3)) == [(3, 3), (2, 2), (3, 16), (2, 16), (16, 3), (16, 2)]
    assert one_at_a_time(1, (4,)) == [(4,)]  # the only part alone is all parts


@pytest.mark.parametrize(("parts", "bits"), [(1, (2, 3, 4)), (3, (2, 4)), (2, (8,))])
def test_a_full_grid_is_every_combination_but_the_model_itself(parts, bits):
    found = full_grid(parts, bits, 1000)
    assert len(found) == len(set(found)) == (len(bits) + 1) ** parts - 1
    assert (16,) * parts not in found and {width for widths in found for width in widths} <= {*bits, 16}
    assert set(one_at_a_time(parts, bits)) <= set(found)


def test_a_grid_that_is_too_large_is_refused_with_its_size():
    with pytest.raises(RefusedError, match=r"4 parts at 4 widths has 255 .* more than --runs \(128\).*random"):
        find_design("grid", 4, (2, 3, 4), 128, 0)


def test_a_random_design_is_a_sample_of_the_grid_that_a_seed_decides():
    one, other, again = (find_design("random", 5, (2, 3), 40, seed) for seed in (1, 2, 1))
    assert one == again != other
    assert set(one_at_a_time(5, (2, 3))) <= set(one) and len(one) == len(set(one)) <= 40 + 12
    assert set(one) <= set(full_grid(5, (2, 3), 1000))
    assert sorted(random_sample(2, (2, 3), 100, 1)) == sorted(full_grid(2, (2, 3), 100))
    levels = np.array(random_sample(8, (2, 3), 600, 0))
    # 4,800 draws with chance 1/3: 3.5 standard deviations are 0.024
    assert abs((levels == 2).mean() - 1 / 3) < 0.024


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed):
    numbers = random.Random(seed)
    points = [(numbers.randrange(12), numbers.randrange(12)) for _ in range(40)]

    def beats(one, other):
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    expected = {point for point in points if not any(beats(other, point) for other in points)}
    front = pareto_front(points)
    assert [points[i] for i in front] == sorted(expected)


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ({2: 3.0, 3: 1.0, 4: 0.5}, {2: 3.0, 3: 1.0, 4: 0.5}),
        ({2: 3.0, 3: 1.0, 4: 2.0}, {2: 3.0, 3: 1.5, 4: 1.5}),
        ({4: 4.0, 3: 1.0, 2: 1.0}, {2: 2.0, 3: 2.0, 4: 2.0}),
        ({2: 1.0, 3: -1.0}, {2: 1.0, 3: 0.0}),
    ],
    ids=["in order", "a pair", "all", "negative"],
)
def test_rises_become_isotonic(rises, expected):
    assert isotonic(rises) == expected


def test_isotonic_rises_equal_scikit_learns():
    sklearn = pytest.importorskip("sklearn.isotonic")
    numbers = np.random.default_rng(0)
    for _ in range(20):
        values = numbers.random(6)
        expected = sklearn.isotonic_regression(values, increasing=False)
        # both are means of a few doubles
        np.testing.assert_allclose(list(isotonic(dict(enumerate(values))).values()), expected, rtol=1e-12)


def modules(count, widths, seed):
    """Choices whose rises fall with the width, sizes with overhead, no two modules alike."""
    numbers = random.Random(seed)
    found = []
    for _ in range(count):
        weights, rise = numbers.randrange(1, 9) * 64, 0.0
        choices = []
        for width in sorted(widths, reverse=True):
            choices.append(Choice(width, weights * width + numbers.randrange(9), rise))
            rise += numbers.choice([0.0, numbers.random(), 10 * numbers.random()])
        found.append(choices)
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("count", "widths"), [(1, (2, 3)), (5, (2, 3, 4, 16)), (7, (2, 3, 16)), (9, (3, 4))])
def test_an_allocation_is_the_best_that_there_is(seed, count, widths):
    given = modules(count, widths, seed)
    least, most = (sum(pick(c.bits for c in choices) for choices in given) for pick in (min, max))
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        budget = least + share * (most - least)
        every = itertools.product(*given)
        best = min(sum(c.rise for c in chosen) for chosen in every if sum(c.bits for c in chosen) <= budget)
        found = allocate(given, budget)
        assert sum(c.bits for c in found) <= budget and all(c in own for c, own in zip(found, given, strict=True))
        assert sum(c.rise for c in found) == pytest.approx(best, abs=1e-9)  # sums of at most 9 numbers below 40


def test_more_bits_never_cost_more_in_400_modules():
    """Brute force would have 4^400 combinations."""
    given = modules(400, (2, 3, 4, 16), 0)
    least, most = (sum(pick(c.bits for c in choices) for choices in given) for pick in (min, max))
    rises = [sum(c.rise for c in allocate(given, least + share * (most - least))) for share in (0, 0.1, 0.2, 0.5, 1)]
    assert rises == sorted(rises, reverse=True) and rises[0] > rises[1] and rises[-1] == 0


def test_an_impossible_allocation_is_refused():
    with pytest.raises(RefusedError, match="below the least that is possible, 20"):
        allocate([[Choice(2, 20, 1.0), Choice(3, 30, 0.0)]], 19)


def test_rises_are_read_from_the_single_runs():
    damage = {(2, 16): 0.5, (3, 16): 0.1, (16, 2): 0.3, (16, 3): 0.2, (2, 2): 9.0}
    assert find_rises(2, (2, 3), damage) == [{2: 0.5, 3: 0.1}, {2: 0.3, 3: 0.2}]


def test_a_forest_finds_the_part_that_matters_and_that_the_narrowest_width_decides():
    """Damage is made so that at 2 bits the first part alone matters, without 2 bits the second: what the data of a
    published study show. The third never does."""
    pytest.importorskip("sklearn")
    first, second = {2: 10.0, 3: 0.0, 4: 0.0, 16: 0.0}, {2: 1.0, 3: 1.0, 4: 0.2, 16: 0.0}
    grid = [*full_grid(3, (2, 3, 4), 100), (16, 16, 16)]
    damage = {widths: first[widths[0]] + second[widths[1]] for widths in grid}
    everything, without = fit_forests(damage, (2, 3, 4), 0)
    assert (everything.rows, everything.without, without.rows, without.without) == (64, None, 27, 2)
    for forest, largest in ((everything, 0), (without, 1)):
        assert sum(forest.impurity) == pytest.approx(1)
        assert int(np.argmax(forest.impurity)) == int(np.argmax(forest.permutation)) == largest
        assert forest.impurity[largest] > 0.9 and forest.impurity[2] < 0.02 and forest.r2 > 0.9
        assert forest.permutation[largest] > 10 * abs(forest.permutation[2]) and forest.spread[largest] > 0


def test_a_forest_is_not_fitted_on_a_handful_of_rows():
    damage = {widths: float(sum(widths)) for widths in full_grid(1, (2, 3, 4), 100)}
    assert fit_forests(damage, (2, 3, 4), 0) == []


def test_a_missing_scikit_learn_is_said(monkeypatch):
    monkeypatch.setattr(forests, "find_spec", lambda name: None)
    with pytest.raises(QuantizeError, match=r"scikit-learn, which is not installed; pip install \"\.\[sweep\]\""):
        check_forest()


def test_a_missing_scipy_is_said(monkeypatch):
    monkeypatch.setattr(knapsack, "find_spec", lambda name: None)
    with pytest.raises(
        QuantizeError, match=r"SciPy, which is not installed; pip install \"\.\[sweep\]\", or leave out"
    ):
        check_solver()


def test_the_solver_leaves_standard_output_to_json(capfd):
    """These modules make HiGHS of SciPy 1.17 say something although it is told to be silent."""
    given = modules(60, (2, 3, 4, 16), 0)
    least, most = (sum(pick(c.bits for c in choices) for choices in given) for pick in (min, max))
    allocate(given, least + 0.2 * (most - least))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_kept_to_the_bit_where_modules_are_large(seed):
    """Sizes of some 10^9 bits without a common divisor, of which the solver's tolerance is many bits."""
    given = [[Choice(c.width, (c.bits << 20) + c.width, c.rise) for c in own] for own in modules(60, (2, 3, 16), seed)]
    least, most = (sum(pick(c.bits for c in choices) for choices in given) for pick in (min, max))
    for share in (0.0, 0.05, 0.3, 0.7, 1.0):
        budget = int(least + share * (most - least))
        assert least <= sum(c.bits for c in allocate(given, budget)) <= budget
