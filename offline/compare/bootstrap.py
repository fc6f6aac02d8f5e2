"""Computes means over samples with bootstrap confidence intervals (percentile method).

All columns of a table are resampled together, so that the difference of two columns has a paired interval.
"""

import warnings

import numpy as np

DRAWS = 4000
LEVEL = 0.95


def intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """[3, m] float64 from values [n, m] float64, finite or NaN: of every column mean, lower and upper bound.

    A NaN is a sample that says nothing about its column; a column of nothing else gives NaN. One sample alone has no
    spread: its bounds are NaN.
    """
    count, rng = len(values), np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaNs, whose mean is NaN
        means = np.nanmean(values, axis=0)
        if count < 2:
            return np.stack([means, np.full_like(means, np.nan), np.full_like(means, np.nan)])
        drawn = np.stack([np.nanmean(values[rng.integers(count, size=count)], axis=0) for _ in range(DRAWS)])
        return np.stack([means, *np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)])
