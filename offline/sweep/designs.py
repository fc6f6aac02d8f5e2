"""Lists the configurations of the parts that are run: tuples with the width of every part, 16 where it is kept.

`one_at_a_time`: every part alone at every width, and all together at every width. `full_grid`: every combination.
`random_sample`: different configurations, each width of each part equally likely. Every design contains the first, so
that the effect of a single part never rests on a fitted model alone.
"""

import itertools
import random

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.settings.quantize import KEPT

Widths = tuple[int, ...]


def find_design(design: str, parts: int, bits: tuple[int, ...], runs: int, seed: int) -> list[Widths]:
    """The configurations of `design` ("one", "grid" or "random") in the order in which they are run, none twice, and
    without the one that leaves everything at 16 bits. Raises RefusedError for a grid of more than `runs`."""
    first = one_at_a_time(parts, bits)
    if design == "one":
        return first
    others = full_grid(parts, bits, runs) if design == "grid" else random_sample(parts, bits, runs, seed)
    return list(dict.fromkeys([*first, *others]))


def one_at_a_time(parts: int, bits: tuple[int, ...]) -> list[Widths]:
    """All parts at each width, from wide to narrow, then each part alone at each width."""
    wide = sorted(bits, reverse=True)
    uniform = [(width,) * parts for width in wide]
    single = [alone(parts, part, width) for part in range(parts) for width in wide]
    return list(dict.fromkeys([*uniform, *single]))


def alone(parts: int, part: int, width: int) -> Widths:
    """One part at `width`, the others at 16."""
    return tuple(width if i == part else KEPT for i in range(parts))


def full_precision(parts: int) -> Widths:
    """Every part at 16 bits."""
    return (KEPT,) * parts


def full_grid(parts: int, bits: tuple[int, ...], limit: int) -> list[Widths]:
    """Every combination of the widths and 16. Raises RefusedError for more than `limit`."""
    levels = (*bits, KEPT)
    count = len(levels) ** parts - 1
    if count > limit:
        raise RefusedError(
            f"the full grid of {parts} parts at {len(levels)} widths has {count} configurations, more than --runs "
            f"({limit}); raise --runs, give fewer --bits or parts, or take --design random"
        )
    return [widths for widths in itertools.product(levels, repeat=parts) if set(widths) != {KEPT}]


def random_sample(parts: int, bits: tuple[int, ...], runs: int, seed: int) -> list[Widths]:
    """`runs` different configurations, or all where there are no more."""
    levels = (*bits, KEPT)
    if len(levels) ** parts - 1 <= runs:
        return full_grid(parts, bits, runs)
    drawn: dict[Widths, None] = {}
    numbers = random.Random(seed)
    while len(drawn) < runs:
        widths = tuple(numbers.choices(levels, k=parts))
        if set(widths) != {KEPT}:
            drawn[widths] = None
    return list(drawn)
