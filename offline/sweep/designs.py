"""Lists the configurations of the parts that are run: tuples with the width of every part, 16 where it is kept."""

import itertools

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.settings.quantize import KEPT

Widths = tuple[int, ...]


def find_design(design: str, parts: int, bits: tuple[int, ...], runs: int) -> list[Widths]:
    """What changes one part alone, and for a "grid" every other combination; never everything at 16 bits. Raises
    RefusedError for a grid of more than `runs`."""
    first = one_at_a_time(parts, bits)
    if design == "one":
        return first
    levels = (*bits, KEPT)
    count = len(levels) ** parts - 1
    if count > runs:
        raise RefusedError(
            f"the full grid of {parts} parts at {len(levels)} widths has {count} configurations, more than --runs "
            f"({runs}); raise --runs, give fewer --bits or parts, or take --design one"
        )
    combinations = (widths for widths in itertools.product(levels, repeat=parts) if set(widths) != {KEPT})
    return list(dict.fromkeys([*first, *combinations]))


def one_at_a_time(parts: int, bits: tuple[int, ...]) -> list[Widths]:
    """All parts at each width, from wide to narrow, then each part alone at each width."""
    wide = sorted(bits, reverse=True)
    uniform = [(width,) * parts for width in wide]
    single = [alone(parts, part, width) for part in range(parts) for width in wide]
    return list(dict.fromkeys([*uniform, *single]))


def alone(parts: int, part: int, width: int) -> Widths:
    """One part at `width`, the others at 16."""
    return tuple(width if i == part else KEPT for i in range(parts))


def find_rises(parts: int, bits: tuple[int, ...], rows: dict[Widths, dict]) -> list[dict[int, float]]:
    """For each part the KL (nats) with this part alone at a width, by width; from the rows of a design."""
    return [{width: rows[alone(parts, part, width)]["kl"] for width in bits} for part in range(parts)]
