"""Which tile of the output one program computes: a static choice, without tuning and without asking the device."""

import math
from dataclasses import dataclass, replace

from vlmq_vllm.format import WORD


@dataclass(frozen=True)
class Tile:
    """A program's part: `tokens` x `rows` of the output, `columns` of the weight per step of its loop."""

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for field in ("tokens", "rows", "columns", "warps"):
            size = getattr(self, field)
            assert size > 0 and size & (size - 1) == 0, f"{field} is {size}; Triton's blocks are powers of two"
        assert self.tokens >= 16 and self.rows >= 16, "a tensor core instruction takes 16 x 16 at least"
        assert self.columns >= WORD, "codes are unpacked in blocks of 32"


# Ascending in tokens. Few tokens: narrow tiles, so that many programs share the reading of the weight, and long steps,
# so that each has many bytes in flight. Many tokens: wide tiles, so that an unpacked weight meets many tokens.
TILES = (
    Tile(tokens=16, rows=32, columns=128, warps=4, stages=4),
    Tile(tokens=32, rows=32, columns=128, warps=4, stages=3),
    Tile(tokens=64, rows=64, columns=64, warps=4, stages=3),
    Tile(tokens=128, rows=64, columns=64, warps=8, stages=3),
)


def pick_tile(m: int, group_size: int) -> Tile:
    """The tile for `m` tokens, its step shortened until it divides a group, so that a step has one scale per row."""
    tile = next((tile for tile in TILES if m <= tile.tokens), TILES[-1])
    if group_size == -1:
        return tile
    return replace(tile, columns=math.gcd(tile.columns, group_size))
