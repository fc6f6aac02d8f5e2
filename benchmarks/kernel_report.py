"""The lines of `kernels.py` as markdown: the machine, a table for every width, what was left out and why.

A line is a dict with a "kind": machine, speed, absent, failed, skipped or refused. Nothing is measured here.
"""

from kernel_cases import LAYERS, Case, target_of
from kernel_peers import DENSE, KERNELS, OURS

LABELS = {layer.label: layer for layer in LAYERS}
NOTES = (
    "us: microseconds of one launch, median over CUDA graph replays, with copies of the weight in turn so that none is "
    "in L2. GB/s: codes, scales, zero points, x and the result, over that. Share: of the copy bandwidth. (n x): a "
    "kernel's time over ours, above 1 where ours is faster. Every kernel's result was compared with the float64 "
    "product of the same dequantised weight before it was timed."
)


def report(lines: list[dict]) -> str:
    """`lines` begin with the one of kind "machine"."""
    machine, speeds = lines[0], [line for line in lines if line["kind"] == "speed"]
    widths = sorted({line["bits"] for line in speeds if line["kernel"] == OURS}, reverse=True)
    parts = [_head(machine), NOTES]
    parts += [f"## W{bits}\n\n{_table(_width(speeds, bits))}" for bits in widths]
    if not widths:
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


def _width(speeds: list[dict], bits: int) -> dict[tuple[str, int], dict[str, dict]]:
    """(layer, tokens) -> kernel -> line, for one width and the dense product beside it."""
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for line in speeds:
        if line["bits"] in (bits, 16):
            found.setdefault((line["layer"], line["tokens"]), {})[line["kernel"]] = line
    order = list(LABELS)
    return {key: found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))}


def _table(cells: dict[tuple[str, int], dict[str, dict]]) -> str:
    cells = {key: row for key, row in cells.items() if OURS in row}
    peers = [name for name in KERNELS if name != OURS and any(name in row for row in cells.values())]
    head = ["layer", "M", "us", "GB/s", "share", *(f"{KERNELS[name].title}, us" for name in peers), "target"]
    rows = [_row(layer, tokens, row, peers) for (layer, tokens), row in cells.items()]
    return _markdown([head, ["---", *["---:"] * (len(head) - 2), "---"], *rows])


def _row(layer: str, tokens: int, row: dict[str, dict], peers: list[str]) -> list[str]:
    mine = row[OURS]
    compared = [_compared(row[name], mine) if name in row else "" for name in peers]
    found = [f"{mine['microseconds']:.1f}", f"{mine['gigabytes_per_second']:,.0f}", f"{mine['share']:.0%}"]
    return [layer, str(tokens), *found, *compared, verdict(mine, row.get(DENSE))]


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
    for (layer, tokens), row in _width(speeds, 16).items():
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
