"""Computes means over samples with bootstrap confidence intervals (percentile method).

All columns of a table are resampled together, so that the difference of two columns has a paired interval.
"""

import numpy as np

DRAWS = 4000
LEVEL = 0.95
BLOCK = 1 << 24  # counts that are drawn at a time, 128 MB


def intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """[3, m] float64 from values [n, m] float64, finite or NaN: of every column mean, lower and upper bound.

    A NaN is a sample that says nothing about its column; a column of nothing else gives NaN. One sample alone has no
    spread: its bounds are NaN.
    """
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    means = _ratio(filled.sum(0), there.sum(0))
    if len(values) < 2:
        return np.stack([means, np.full_like(means, np.nan), np.full_like(means, np.nan)])
    drawn = _resampled(filled, there.astype(float), np.random.default_rng(seed))
    tail = (1 - LEVEL) / 2
    bounds = np.full((2, values.shape[1]), np.nan)
    for column in np.flatnonzero(there.any(0)):
        # a resample without any value of this column has no mean and is left out
        some = drawn[~np.isnan(drawn[:, column]), column]
        bounds[:, column] = np.quantile(some, [tail, 1 - tail])
    return np.concatenate([means[None], bounds])


def _resampled(filled: np.ndarray, there: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Column means of DRAWS resamples [DRAWS, m]: how often each sample is drawn is multinomial."""
    count = len(filled)
    step = max(1, BLOCK // count)
    means = []
    for start in range(0, DRAWS, step):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(step, DRAWS - start)).astype(float)
        means.append(_ratio(weights @ filled, weights @ there))
    return np.concatenate(means)


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
