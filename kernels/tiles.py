"""Chooses a launch's tile and its number of parts of K, from the tables (`tuned_tables.py`) or by a small model.

Nothing is tried out at run time. How many parts K is divided into follows from the waves that the programs make, unless
measured. `why_not` says what can be launched at all.
"""

import math
from dataclasses import replace
from functools import cache

from vlmq_vllm.kernels.hardware import Hardware
from vlmq_vllm.kernels.layout import PLANES, STRIPE, Geometry
from vlmq_vllm.kernels.tuned_tables import BUCKETS, Plan, Tile, key_of, path_of, table_of
from vlmq_vllm.kernels.workspace import COUNTERS, PARTIALS

# Bytes that must be on their way to a multiprocessor for it to get its share of the bandwidth: latency times share,
# 0.75 us * 4.3 TB/s / 132 on an H200, with room.
IN_FLIGHT = 32 << 10
# What a part costs besides its spans: filling the pipeline, storing and adding its sums. Not measured.
PART_SPANS = 0.5
MAX_SPLITS = 16
WARPS = 8  # of a multiprocessor, two for each scheduler: with fewer none works while another waits
INVARIANT = 32  # tokens whose plan serves every number of them when results may not depend on it


def why_not(plan: Plan, m: int, geometry: Geometry, machine: Hardware) -> str | None:
    """Why this plan cannot run for m tokens, or None when it can."""
    tile = plan.tile
    if tile.rows not in (STRIPE, 2 * STRIPE, 4 * STRIPE):
        return f"rows is {tile.rows}; a tile has {STRIPE}, {2 * STRIPE} or {4 * STRIPE}, as the layout stores them"
    if tile.tokens < machine.least_tokens or tile.tokens & (tile.tokens - 1):
        return f"tokens is {tile.tokens}; a tile has a power of two from {machine.least_tokens} on"
    if tile.warps not in (1, 2, 4, 8) or tile.stages < 1:
        return f"{tile.warps} warps and {tile.stages} stages; a tile has 1, 2, 4 or 8 and at least 1"
    needed = shared_bytes(tile, geometry, machine)
    if needed > machine.shared:
        return f"{tile.stages} stages keep {needed} bytes in shared memory; {machine.arch} has {machine.shared}"
    if not 1 <= plan.splits <= geometry.spans:
        return f"splits is {plan.splits}; K has {geometry.spans} spans"
    if math.ceil(geometry.spans / math.ceil(geometry.spans / plan.splits)) != plan.splits:
        return f"{plan.splits} parts of {geometry.spans} spans would leave one empty"
    programs = output_tiles(m, geometry, tile)
    if plan.splits > 1 and (programs > COUNTERS or programs * plan.splits * tile.rows * tile.tokens > PARTIALS):
        return f"{programs} tiles in {plan.splits} parts do not fit into the workspace"
    return None


def plan_for(m: int, geometry: Geometry, machine: Hardware) -> Plan:
    bucket = next((bucket for bucket in BUCKETS if m <= bucket), BUCKETS[-1])
    return _plan(bucket, -(-m // bucket) if bucket == BUCKETS[-1] else 1, geometry, machine)


def tokens_at_once(plan: Plan, geometry: Geometry) -> int:
    """The most tokens, in whole tiles, whose parts fit into the workspace."""
    if plan.splits == 1:
        return 1 << 30
    programs = output_tiles(1, geometry, plan.tile)
    room = PARTIALS // (programs * plan.splits * plan.tile.rows * plan.tile.tokens)
    return min(room, COUNTERS // programs) * plan.tile.tokens


def dequantize_from(machine: Hardware) -> int:
    """The number of tokens from which dequantising and cuBLAS take over."""
    return table_of(machine)["dequantise_from"]


@cache
def _plan(bucket: int, wide: int, geometry: Geometry, machine: Hardware) -> Plan:
    m = bucket * wide
    table = table_of(machine)
    measured = table.get("measured", {}).get(key_of(geometry, bucket)) if wide == 1 else None
    if measured:
        chosen = Plan(Tile(**measured["tile"]), measured["splits"])
    else:
        tile = _fit(Tile(**table["tiles"][str(geometry.bits)][str(bucket)]), geometry, machine)
        chosen = Plan(tile, splits_of(m, geometry, tile, machine))
    if geometry.group == -1:  # one scale per row multiplies the sums at the end
        chosen = replace(chosen, tile=replace(chosen.tile, scaled=False))
    reason = why_not(chosen, m, geometry, machine)
    if reason:
        raise ValueError(f"{path_of(machine)} has no usable entry for {key_of(geometry, bucket)}: {reason}; tune anew")
    return chosen


def output_tiles(m: int, geometry: Geometry, tile: Tile) -> int:
    return -(-m // tile.tokens) * -(-geometry.stripes * STRIPE // tile.rows)


def shared_bytes(tile: Tile, geometry: Geometry, machine: Hardware) -> int:
    """Shared memory of a program: a buffer of words and of x for every stage but the one at work, and a span's scales.

    wgmma reads x from shared memory while later loads are on their way, which takes one buffer more. On its way out the
    tile of sums may pass through the same memory.
    """
    words = tile.rows * PLANES[geometry.bits] * geometry.slice * 2
    x = tile.tokens * geometry.span * 2
    asynchronous = machine.arch.startswith(("sm_9", "sm_10")) and tile.warps >= 4
    buffers = (tile.stages - 1) * (words + x) + (x if asynchronous else 0)
    groups = geometry.span // geometry.group if 0 < geometry.group < geometry.span else 1
    return max(buffers, tile.rows * tile.tokens * 4) + tile.rows * groups * 4


def splits_of(m: int, geometry: Geometry, tile: Tile, machine: Hardware) -> int:
    """The number of parts with the shortest time in a model of waves.

    A multiprocessor shares its bandwidth among its programs, so its time is the spans of all of them, longer where so
    few are there that too few bytes are on their way, or too few warps at work.
    """
    programs = output_tiles(m, geometry, tile)
    bytes_ahead = max(1, tile.stages - 1) * tile.rows * PLANES[geometry.bits] * geometry.slice * 2

    def time(splits: int) -> float:
        share = programs * splits / machine.multiprocessors
        most = max(share, 1.0)
        busy = min(1.0, most * bytes_ahead / IN_FLIGHT, most * tile.warps / WARPS)
        spans = math.ceil(geometry.spans / splits) + (PART_SPANS if splits > 1 else 0)
        return math.ceil(share) * spans / busy

    options = [
        splits
        for splits in range(1, min(geometry.spans, MAX_SPLITS) + 1)
        if why_not(Plan(tile, splits), m, geometry, machine) is None
    ]
    return min(options, key=time, default=1)


def _fit(tile: Tile, geometry: Geometry, machine: Hardware) -> Tile:
    """The tile, adapted to slices narrower and shared memory smaller than its table was made for.

    Triton copies x asynchronously only if a slice has 4 bytes for every thread, so narrow slices have fewer threads.
    """
    while tile.warps > max(1, tile.tokens * geometry.slice // 64) and tile.rows > STRIPE:
        tile = replace(tile, warps=tile.warps // 2, rows=tile.rows // 2)
    while shared_bytes(tile, geometry, machine) > machine.shared:
        less = tile.stages > 2
        tile = replace(tile, stages=tile.stages - 1) if less else replace(tile, tokens=tile.tokens // 2)
    return tile
