"""Writes the lines of `speed.py` as markdown: the machine, a table for every width, what was left out and why.

A line is a dict with a "kind": machine, speed, absent, failed, skipped or refused. Nothing is measured here.
"""

from benchmarks.kernel.cases import BITS, INT8_BITS, LAYERS, Case, width
from benchmarks.kernel.contenders import DENSE, KERNELS, OWN
from benchmarks.kernel.targets import target_of

LABELS = {layer.label: layer for layer in LAYERS}
NOTES = (
    "us: microseconds of one launch, median over CUDA graph replays, with copies of the weight in turn so that none is "
    "in L2. GB/s: codes, scales, zero points, x and the result, over that. Share: of the copy bandwidth. (n x): a "
    "kernel's time over ours, above 1 where ours is faster. Every kernel's result was compared with the float64 "
    "product of the same dequantised weight before it was timed."
)
INT8_NOTES = (
    "W4A8 and W8A8: activations of 8 bits, with a scale for every token; rounding them is in no time, ours or a "
    "peer's, and the exact product is that of the rounded ones. vlmq and cuBLAS stand beside with activations of 16 "
    "bits and the same weights. At 8 bits a weight has one scale per row."
)


def report(lines: list[dict]) -> str:
    """`lines` begin with the one of kind "machine"."""
    machine, speeds = lines[0], [line for line in lines if line["kind"] == "speed"]
    tables = [
        (bits, activations)
        for activations, choices in ((16, BITS), (8, INT8_BITS))
        for bits in sorted(choices, reverse=True)
        if any((line["bits"], line["kernel"]) == (bits, OWN[activations]) for line in speeds)
    ]
    rounded = any(activations == 8 for _, activations in tables)
    parts = [_head(machine), NOTES, *([INT8_NOTES] if rounded else [])]
    parts += [f"## {width(*which)}\n\n{_table(speeds, *which)}" for which in tables]
    if not tables:
        parts += [f"## cuBLAS, {machine['dtype']}\n\n{_dense(speeds)}"]
    return "\n\n".join([*parts, *_left_out(lines)]) + "\n"


def _head(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"# Speed of the kernels, {machine['date'][:10]}\n\n"
        f"{machine['device']} (driver, clocks, power limit: {machine['driver']}); {versions}.\n"
        f"Copy of {machine['copied_bytes'] >> 20} MiB in device memory: {machine['copy']:,.0f} GB/s read and written. "
        f"A kernel that does nothing takes {machine['empty']:.2f} us in a CUDA graph.\n"
        f"{machine['dtype']}, group size {machine['group_size']}, "
        f"{'symmetric' if machine['symmetric'] else 'with zero points'}, random weights.\n\n"
        f"    {machine['command']}"
    )


def _cells(speeds: list[dict], bits: int) -> dict[tuple[str, int], dict[str, dict]]:
    """(layer, tokens) -> kernel -> line, for one width and the dense product beside it."""
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for line in speeds:
        if line["bits"] in (bits, 16):
            found.setdefault((line["layer"], line["tokens"]), {})[line["kernel"]] = line
    order = list(LABELS)
    return {key: found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))}


def _table(speeds: list[dict], bits: int, activations: int) -> str:
    """Of the cases that our kernel has a figure for, with those that stand beside it; targets are for 16 bits of x."""
    own = OWN[activations]
    cells = {key: row for key, row in _cells(speeds, bits).items() if own in row}
    beside = [name for name, kernel in KERNELS.items() if name != own and activations in kernel.activations]
    peers = [name for name in beside if any(name in row for row in cells.values())]
    head = ["layer", "M", "us", "GB/s", "share", *(f"{KERNELS[name].title}, us" for name in peers)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    rows += [_row(layer, tokens, row, own, peers) for (layer, tokens), row in cells.items()]
    if activations == 16:
        targets = [verdict(row[own], row.get(DENSE)) for row in cells.values()]
        rows = [[*row, last] for row, last in zip(rows, ["target", "---", *targets], strict=True)]
    return _markdown(rows)


def _row(layer: str, tokens: int, row: dict[str, dict], own: str, peers: list[str]) -> list[str]:
    mine = row[own]
    compared = [_compared(row[name], mine) if name in row else "" for name in peers]
    found = [f"{mine['microseconds']:.1f}", f"{mine['gigabytes_per_second']:,.0f}", f"{mine['share']:.0%}"]
    return [layer, str(tokens), *found, *compared]


def _compared(line: dict, mine: dict) -> str:
    return f"{line['microseconds']:.1f} ({ratio(line, mine):.2f} x)"


def ratio(line: dict, mine: dict) -> float:
    """How many times longer than ours."""
    return line["microseconds"] / mine["microseconds"]


def verdict(mine: dict, dense: dict | None) -> str:
    """Whether the case reached its target, empty where it has none."""
    target = target_of(Case(LABELS[mine["layer"]], mine["bits"], mine["tokens"]))
    if target is None:
        return ""
    speedup = None if dense is None else ratio(dense, mine)
    return "; ".join(target.missed(mine["microseconds"], mine["share"], speedup)) or "met"


def _dense(speeds: list[dict]) -> str:
    rows = [["layer", "M", "us", "GB/s", "share", "TFLOP/s"], ["---", *["---:"] * 5]]
    for (layer, tokens), row in _cells(speeds, 16).items():
        line = row[DENSE]
        found = [f"{line['microseconds']:.1f}", f"{line['gigabytes_per_second']:,.0f}", f"{line['share']:.0%}"]
        rows.append([layer, str(tokens), *found, f"{line['teraflops']:.0f}"])
    return _markdown(rows)


def _left_out(lines: list[dict]) -> list[str]:
    """Kernels and cases without a figure, those of one reason in one line."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        if line["kind"] in ("absent", "failed", "skipped"):
            cases = reasons.setdefault((line["kind"], line["kernel"], line["reason"]), [])
            cases += [line["case"]] if "case" in line else []
    if not reasons:
        return []
    told = [
        f"* {KERNELS[kernel].title} {kind}: `{reason}`" + (f" ({len(cases)}: {', '.join(cases)})" if cases else "")
        for (kind, kernel, reason), cases in reasons.items()
    ]
    return ["## Left out", "\n".join(told)]


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
