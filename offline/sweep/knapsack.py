"""Widths for modules that cost least damage within a number of bits: a knapsack with one choice per module.

    minimise sum_m rise_m(w_m)    with    sum_m bits_m(w_m) <= budget

rise_m(w): damage with module m alone at width w (nats). That the damages add up is an assumption: the mixture found is
to be measured. Measured rises are noisy, so a wider width may look worse; they are made isotonic first (`isotonic`).
The minimum is exact: partial choices are kept in order of their bits as far as none with fewer bits is as good, and as
far as the convex relaxation of the rest lets them still beat the best whole choice known, which the greedy walk along
the convex hulls gives.
"""

from dataclasses import dataclass

import numpy as np

from vlmq_vllm.errors import RefusedError


@dataclass(frozen=True)
class Choice:
    """A width, its bits on disk and its rise."""

    width: int
    bits: int
    rise: float


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
    """One choice per module with the least sum of rises within `budget` bits; of equal ones the smallest.

    Raises RefusedError for a budget below the smallest choices.
    """
    least = sum(min(choice.bits for choice in choices) for choices in modules)
    if budget < least:
        raise RefusedError(f"a budget of {budget:.0f} bits is below the least that is possible, {least}")
    hulls = [_hull(choices) for choices in modules]
    best = _greedy(hulls, budget)
    slack = 1e-12 * (1 + best)
    bits, rises = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each state kept: the state before it, the choice
    for number, choices in enumerate(modules):
        count = len(bits)
        before = np.tile(np.arange(count), len(choices))
        chosen = np.repeat(np.arange(len(choices)), count)
        bits = np.concatenate([bits + choice.bits for choice in choices])
        rises = np.concatenate([rises + choice.rise for choice in choices])
        bound = _relaxed(hulls[number + 1 :], budget - bits)
        kept = np.flatnonzero(rises + bound <= best + slack)
        kept = kept[np.lexsort((rises[kept], bits[kept]))]
        earlier = np.minimum.accumulate(np.concatenate([[np.inf], rises[kept][:-1]]))
        kept = kept[rises[kept] < earlier]
        bits, rises = bits[kept], rises[kept]
        steps.append((before[kept], chosen[kept]))
    state, found = int(np.argmin(rises)), []
    for choices, (before, chosen) in zip(reversed(modules), reversed(steps), strict=True):
        found.append(choices[chosen[state]])
        state = before[state]
    return found[::-1]


def _hull(choices: list[Choice]) -> list[Choice]:
    """The lower convex hull of rise over bits, from the smallest choice to the least rise."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.rise)):
        if hull and choice.rise >= hull[-1].rise:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(one: Choice, other: Choice) -> float:
    return (other.rise - one.rise) / (other.bits - one.bits)


def _segments(hulls: list[list[Choice]]) -> list[tuple[int, float]]:
    """Steps along all hulls as (bits, change of rise), the best per bit first."""
    steps = [(b.bits - a.bits, b.rise - a.rise) for hull in hulls for a, b in zip(hull, hull[1:], strict=False)]
    return sorted(steps, key=lambda step: step[1] / step[0])


def _greedy(hulls: list[list[Choice]], budget: float) -> float:
    """Rise of the whole choice that takes every step along the hulls that still fits, the best per bit first."""
    places = [0] * len(hulls)
    bits = sum(hull[0].bits for hull in hulls)
    steps = [(m, i) for m, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    for module, place in sorted(steps, key=lambda step: _slope(*hulls[step[0]][step[1] : step[1] + 2])):
        more = hulls[module][place + 1].bits - hulls[module][place].bits
        if places[module] == place and bits + more <= budget:
            places[module], bits = place + 1, bits + more
    return sum(hull[place].rise for hull, place in zip(hulls, places, strict=True))


def _relaxed(hulls: list[list[Choice]], left: np.ndarray) -> np.ndarray:
    """Least sum of rises of the modules `hulls` with `left` bits if widths could be mixed; infinite where none fits."""
    steps = _segments(hulls)
    bits = np.cumsum([sum(hull[0].bits for hull in hulls), *(step[0] for step in steps)])
    rises = np.cumsum([sum(hull[0].rise for hull in hulls), *(step[1] for step in steps)])
    return np.where(left < bits[0], np.inf, np.interp(left, bits, rises))
