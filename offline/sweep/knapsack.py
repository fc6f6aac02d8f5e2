"""Chooses widths for modules that cost least damage within a number of bits: a knapsack with one choice per module.

    minimise sum_m rise_m(w_m)    with    sum_m bits_m(w_m) <= budget

rise_m(w): damage with module m alone at width w (nats). That the damages add up is an assumption: the mixture found is
to be measured. The minimum is found by SciPy's mixed-integer solver (HiGHS).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np

from vlmq_vllm.errors import QuantizeError, RefusedError

SCALE = 1e5  # the greatest rise for the solver, which stops within 1e-6 of the minimum


def check_solver() -> None:
    """Raises QuantizeError when SciPy is missing."""
    if find_spec("scipy") is None:
        raise QuantizeError(
            'a budget needs SciPy, which is not installed; pip install ".[sweep]", or leave out --budget'
        )


def allocate(bits: np.ndarray, rises: np.ndarray, budget: float) -> list[int]:
    """For each of M modules the number of its width with the least sum of rises within `budget` bits; of equal ones
    the smallest. bits: [M, W] int64 on disk. rises: [M, W] float64. Raises RefusedError for a budget below the
    smallest choices."""
    least = int(bits.min(1).sum())
    if budget < least:
        raise RefusedError(f"a budget of {budget:.0f} bits is below the least that is possible, {least}")
    limit = budget
    while True:
        found = _solved(bits, rises, limit)
        over = np.take_along_axis(bits, found[:, None], 1).sum() - budget
        if over <= 0:
            return found.tolist()
        limit = max(limit - over, least)  # the solver's tolerance is a part of the budget, which may be more than a bit


def _solved(bits: np.ndarray, rises: np.ndarray, budget: float) -> np.ndarray:
    """Numbers of widths [M]."""
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    modules, widths = bits.shape
    one_each = kron(eye_array(modules), np.ones((1, widths)))
    unit = np.gcd.reduce(bits, axis=None)  # small whole numbers, which are added up exactly
    with _standard_output_to_error():
        found = milp(
            rises.ravel() * (SCALE / (rises.max() or 1.0)),
            integrality=np.ones(bits.size),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(bits.reshape(1, -1) // unit, ub=budget // unit),
            ],
            options={"mip_rel_gap": 0},
        )
    assert found.x is not None, found.message  # the smallest choices always fit
    taken = found.x.reshape(bits.shape).argmax(1)[:, None]
    as_good = rises <= np.take_along_axis(rises, taken, 1)
    return np.where(as_good, bits, np.iinfo(bits.dtype).max).argmin(1)


@contextmanager
def _standard_output_to_error() -> Iterator[None]:
    """HiGHS writes notes to the process's standard output even where it is told to be silent; JSON goes there."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
