"""Chooses widths for modules that cost least damage within a number of bits: a knapsack with one choice per module.

    minimise sum_m rise_m(w_m)    with    sum_m bits_m(w_m) <= budget

rise_m(w): damage with module m alone at width w (nats). That the damages add up is an assumption: the mixture found is
to be measured. Measured rises are noisy, so a wider width may look worse; they are made isotonic first (`isotonic`).
The minimum is found by SciPy's mixed-integer solver (HiGHS).
"""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from vlmq_vllm.errors import QuantizeError, RefusedError

SCALE = 1e5  # the greatest rise for the solver, which stops within 1e-6 of the minimum


@dataclass(frozen=True)
class Choice:
    """A width, its bits on disk and its rise."""

    width: int
    bits: int
    rise: float


def check_solver() -> None:
    """Raises QuantizeError when SciPy is missing."""
    if find_spec("scipy") is None:
        raise QuantizeError(
            'a budget needs SciPy, which is not installed; pip install ".[sweep]", or leave out --budget'
        )


def isotonic(rises: dict[int, float]) -> dict[int, float]:
    """The nearest rises in least squares that are not negative and never grow with the width (pooling violators)."""
    widths = sorted(rises)
    blocks: list[list[float]] = []  # mean, members
    for width in widths:
        blocks.append([rises[width], 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (mean, count), (other, members) = blocks[-2:]
            blocks[-2:] = [[(mean * count + other * members) / (count + members), count + members]]
    values = [max(0.0, mean) for mean, count in blocks for _ in range(int(count))]
    return dict(zip(widths, values, strict=True))


def allocate(modules: list[list[Choice]], budget: float) -> list[Choice]:
    """One choice per module with the least sum of rises within `budget` bits; of a module's equal ones the smallest.

    Raises RefusedError for a budget below the smallest choices.
    """
    least = sum(min(choice.bits for choice in choices) for choices in modules)
    if not modules:
        return []
    if budget < least:
        raise RefusedError(f"a budget of {budget:.0f} bits is below the least that is possible, {least}")
    limit = budget
    while True:
        found = _solved(modules, limit)
        over = sum(choice.bits for choice in found) - budget
        if over <= 0:
            return found
        limit = max(limit - over, least)  # the solver's tolerance is a part of the budget, which may be more than a bit


def _solved(modules: list[list[Choice]], budget: float) -> list[Choice]:
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    every = [choice for choices in modules for choice in choices]
    owners = [number for number, choices in enumerate(modules) for _ in choices]
    one_each = csr_array((np.ones(len(every)), (owners, range(len(every)))))
    rises = np.array([choice.rise for choice in every])
    unit = math.gcd(*(choice.bits for choice in every))  # small whole numbers, which are added up exactly
    bits = np.array([[choice.bits // unit for choice in every]], dtype=float)
    with _standard_output_to_error():
        found = milp(
            rises * (SCALE / (rises.max() or 1.0)),
            integrality=np.ones(len(every)),
            bounds=(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits, ub=budget // unit)],
            options={"mip_rel_gap": 0},
        )
    assert found.x is not None, found.message  # the smallest choices always fit
    taken = [choice for choice, share in zip(every, found.x, strict=True) if share > 0.5]
    pairs = zip(modules, taken, strict=True)
    return [min((c for c in own if c.rise <= one.rise), key=lambda c: (c.bits, c.rise)) for own, one in pairs]


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
