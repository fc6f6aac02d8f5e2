"""Configurations, fronts and budgets of the component study on made-up data whose right answer is known."""

import ctypes
import itertools
import random

import numpy as np
import pytest

from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.offline.sweep import knapsack
from vlmq_vllm.offline.sweep.knapsack import allocate, check_solver
from vlmq_vllm.offline.sweep.mixtures import isotonic
from vlmq_vllm.offline.sweep.pareto import pareto_front
from vlmq_vllm.offline.sweep.parts import Part, find_rises, one_at_a_time


def test_one_at_a_time_changes_one_part_or_all():
    assert one_at_a_time(2, (2, 3)) == [(3, 3), (2, 2), (3, 16), (2, 16), (16, 3), (16, 2)]
    assert one_at_a_time(1, (4,)) == [(4,)]  # the only part alone is all parts


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
        ([3.0, 1.0, 0.5], [3.0, 1.0, 0.5]),
        ([3.0, 1.0, 2.0], [3.0, 1.5, 1.5]),
        ([1.0, 1.0, 4.0], [2.0, 2.0, 2.0]),
        ([1.0, -1.0], [1.0, 0.0]),
    ],
    ids=["in order", "a pair", "all", "negative"],
)
def test_rises_become_isotonic(rises, expected):
    assert isotonic(np.array(rises)).tolist() == expected


def modules(count, widths, seed):
    """Sizes with overhead and rises that fall with the width [count, widths], no two modules alike."""
    numbers = random.Random(seed)
    bits, rises = [], []
    for _ in range(count):
        weights = numbers.randrange(1, 9) * 64
        bits.append([weights * width + numbers.randrange(9) for width in widths])
        steps = [numbers.choice([0.0, numbers.random(), 10 * numbers.random()]) for _ in widths[1:]]
        rises.append([sum(steps[i:]) for i in range(len(widths))])
    return np.array(bits), np.array(rises)


def totals(given, chosen):
    """Bits and rise of the choices."""
    return tuple(float(sum(row[i] for row, i in zip(table, chosen, strict=True))) for table in given)


def budgets(bits, *shares):
    least, most = int(bits.min(1).sum()), int(bits.max(1).sum())
    return [least + share * (most - least) for share in shares]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("count", "widths"), [(1, (2, 3)), (5, (2, 3, 4, 16)), (7, (2, 3, 16)), (9, (3, 4))])
def test_an_allocation_is_the_best_that_there_is(seed, count, widths):
    given = modules(count, widths, seed)
    every = [totals(given, chosen) for chosen in itertools.product(range(len(widths)), repeat=count)]
    for budget in budgets(given[0], 0.0, 0.1, 0.35, 0.7, 1.0):
        bits, rise = totals(given, allocate(*given, budget))
        best = min(rise for bits, rise in every if bits <= budget)
        assert bits <= budget and rise == pytest.approx(best, abs=1e-9)  # sums of at most 9 numbers below 40


def test_more_bits_never_cost_more_in_400_modules():
    """Brute force would have 4^400 combinations."""
    given = modules(400, (2, 3, 4, 16), 0)
    rises = [totals(given, allocate(*given, budget))[1] for budget in budgets(given[0], 0, 0.1, 0.2, 0.5, 1)]
    assert rises == sorted(rises, reverse=True) and rises[0] > rises[1] and rises[-1] == 0


def test_of_equal_widths_the_smallest_is_chosen():
    assert allocate(np.array([[2, 3, 4]]), np.array([[1.0, 0.5, 0.5]]), 4) == [1]


def test_an_impossible_allocation_is_refused():
    with pytest.raises(RefusedError, match="below the least that is possible, 20"):
        allocate(np.array([[20, 30]]), np.array([[1.0, 0.0]]), 19)


def test_rises_are_read_from_the_single_runs():
    kl = {(2, 16): 0.5, (3, 16): 0.1, (16, 2): 0.3, (16, 3): 0.2, (2, 2): 9.0}
    rows = {widths: {"kl": value} for widths, value in kl.items()}
    found = find_rises([Part("one", ()), Part("two", ())], (2, 3), rows)
    assert found == {"one": {2: 0.5, 3: 0.1}, "two": {2: 0.3, 3: 0.2}}


def test_a_missing_scipy_is_said(monkeypatch):
    monkeypatch.setattr(knapsack, "find_spec", lambda name: None)
    with pytest.raises(
        QuantizeError, match=r"SciPy, which is not installed; pip install \"\.\[sweep\]\", or leave out"
    ):
        check_solver()


def test_the_solver_leaves_standard_output_to_json(capfd):
    """These modules make HiGHS of SciPy 1.17 say something although it is told to be silent."""
    given = modules(60, (2, 3, 4, 16), 0)
    allocate(*given, *budgets(given[0], 0.2))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_kept_to_the_bit_where_modules_are_large(seed):
    """Sizes of some 10^9 bits without a common divisor, of which the solver's tolerance is many bits."""
    bits, rises = modules(60, (2, 3, 16), seed)
    bits = (bits << 20) + np.array([2, 3, 16])
    for budget in budgets(bits, 0.0, 0.05, 0.3, 0.7, 1.0):
        assert bits.min(1).sum() <= totals((bits, rises), allocate(bits, rises, int(budget)))[0] <= int(budget)
