"""Says how much each part matters: what it costs alone, and what a random forest makes of many configurations.

A part's rise at a width is the damage (KL in nats) with this part alone at that width. The forest predicts the damage
from the widths of all parts; its importances are shares of a model of the results, not damage. They rest on the rows
they are fitted on, and rows with the narrowest width carry most of the variance (in the published data of the study of
Das et al. the shares of two components turn around once those rows go), so that they are given without them too.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.sweep.designs import Widths, alone

TREES = 500
REPEATS = 30  # shuffles of each column
LEAST = 12  # rows; fewer leave too few out of a bag


@dataclass(frozen=True)
class Forest:
    """Importances by part, in the order of the parts.

    rows: fitted on so many. without: the width whose rows were left out, None for none. r2: of predictions out of bag.
    impurity: shares of the variance that splits on a part explain, sum 1. permutation, spread: mean and standard
    deviation of the fall of R^2 on the fitted rows when a part's widths are shuffled.
    """

    rows: int
    without: int | None
    r2: float
    impurity: list[float]
    permutation: list[float]
    spread: list[float]


def find_rises(parts: int, bits: tuple[int, ...], damage: dict[Widths, float]) -> list[dict[int, float]]:
    """For each part its damage alone, by width; `damage` by configuration, above that with everything at 16 bits."""
    return [{width: damage[alone(parts, part, width)] for width in bits} for part in range(parts)]


def check_forest() -> None:
    """Raises QuantizeError when scikit-learn is missing."""
    if find_spec("sklearn") is None:
        raise QuantizeError(
            'designs "grid" and "random" need scikit-learn, which is not installed; pip install ".[sweep]", or take '
            "--design one"
        )


def fit_forests(damage: dict[Widths, float], bits: tuple[int, ...], seed: int) -> list[Forest]:
    """Forests on all rows and on those without the narrowest width, as far as there are enough rows that differ."""
    narrow = min(bits)
    others = {widths: value for widths, value in damage.items() if narrow not in widths}
    candidates = [(damage, None)] + ([(others, narrow)] if len(bits) > 1 else [])
    return [
        fit_forest(rows, without, seed)
        for rows, without in candidates
        if len(rows) >= LEAST and len(set(rows.values())) > 1
    ]


def fit_forest(damage: dict[Widths, float], without: int | None, seed: int) -> Forest:
    """One forest on all of `damage`."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    features = np.array([list(widths) for widths in damage], dtype=float)
    values = np.array(list(damage.values()))
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed, n_jobs=1).fit(features, values)
    shuffled = permutation_importance(forest, features, values, n_repeats=REPEATS, random_state=seed, n_jobs=1)
    return Forest(
        rows=len(values),
        without=without,
        r2=float(forest.oob_score_),
        impurity=forest.feature_importances_.tolist(),
        permutation=shuffled.importances_mean.tolist(),
        spread=shuffled.importances_std.tolist(),
    )
