"""Writes the lines of `throughput.py` as markdown: the machine, speed, memory, what was left out and why.

A line is a dict with a "kind": machine, run, failed or skipped. Figures are medians over the rounds; a ratio is that of
a variant to the 16-bit model in the same round, and the median of those, so that a machine that becomes slower from
round to round does not show in it. Nothing is measured here.
"""

from statistics import median

from benchmarks.serve.variants import DENSE, PERCENTILES, VARIANTS

NOTES = (
    "Load by `vllm bench serve`: pictures of random pixels beside random words, the same requests for every variant; "
    "a server of its own for each, one after the other, in every round; no cache of prefixes or pictures. TTFT: time "
    "to the first token. TPOT: time for each later one. (n x): over bf16's figure in the same round, so above 1 is "
    "better for throughput, below 1 for times and memory. Others: cores that processes of no concern to the benchmark "
    "kept busy during the load."
)
LATENCIES = [f"{metric}_p{p}_ms" for metric in ("ttft", "tpot") for p in PERCENTILES]
ON_CPU = (
    "The KV cache of a CPU is as large as VLLM_CPU_KVCACHE_SPACE says, so its tokens tell nothing of the weights, and "
    "vLLM does not tell how much memory those take. Host memory is that of all its processes, with Python and torch."
)


def report(lines: list[dict]) -> str:
    """`lines` begin with the one of kind "machine"."""
    runs = by_variant(lines)
    parts = [_head(lines[0]), NOTES]
    if runs:
        parts += ["## Speed", _speed(runs), "## Memory", _memory(runs)]
        parts += [] if lines[0]["gpu"] else [ON_CPU]
    return "\n\n".join([*parts, *_left_out(lines)]) + "\n"


def by_variant(lines: list[dict]) -> dict[str, dict[int, dict]]:
    """variant -> round -> line, in the order of `VARIANTS`."""
    found: dict[str, dict[int, dict]] = {name: {} for name in VARIANTS}
    for line in lines:
        if line["kind"] == "run":
            found[line["variant"]][line["round"]] = line
    return {name: rounds for name, rounds in found.items() if rounds}


def ratio(runs: dict[str, dict[int, dict]], variant: str, figure: str) -> float | None:
    """Median over the rounds of a figure divided by bf16's in that round; None where they share no round."""
    dense = runs.get(DENSE, {})
    shared = [
        line[figure] / dense[number][figure]
        for number, line in runs[variant].items()
        if number in dense and line.get(figure) is not None and dense[number].get(figure)
    ]
    return median(shared) if shared else None


def _head(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"# Serving {machine['model']}, {machine['date'][:10]}\n\n"
        f"{machine['device']}; {versions}.\n"
        f"{machine['load']}\n\n"
        f"    {machine['command']}"
    )


def _speed(runs: dict[str, dict[int, dict]]) -> str:
    titles = [f"{name} p{p}, ms" for name in ("TTFT", "TPOT") for p in PERCENTILES]
    rows = [["served", "runs", "requests/s", "from - to", "output tokens/s", *titles, "others"]]
    for name, rounds in runs.items():
        speeds = [line["requests_per_second"] for line in rounds.values()]
        cells = [_cell(runs, name, figure) for figure in ("output_tokens_per_second", *LATENCIES)]
        others = f"{median(line['others_cores'] for line in rounds.values()):.1f}"
        requests = _cell(runs, name, "requests_per_second", ".2f")
        rows.append([name, str(len(rounds)), requests, f"{min(speeds):.2f} - {max(speeds):.2f}", *cells, others])
    return _markdown(rows)


def _memory(runs: dict[str, dict[int, dict]]) -> str:
    """Only columns that some variant has a figure in."""
    columns = {
        "file_bytes": ("files, MB", ",.1f", 1e6),
        "weights_gib": ("weights, GiB", ".2f", 1),
        "kv_gib": ("KV cache, GiB", ".2f", 1),
        "kv_tokens": ("KV cache, tokens", ",.0f", 1),
        "resident_bytes": ("host memory, MB", ",.0f", 1e6),
        "start_seconds": ("start, s", ".0f", 1),
    }
    told = [name for name in columns if any(line.get(name) is not None for r in runs.values() for line in r.values())]
    rows = [["served", *(columns[name][0] for name in told), "vLLM's kernel"]]
    for variant, rounds in runs.items():
        cells = [_cell(runs, variant, name, *columns[name][1:]) for name in told]
        kernels = sorted({kernel for line in rounds.values() for kernel in line["kernels"]})
        rows.append([variant, *cells, ", ".join(kernels)])
    return _markdown(rows)


def _cell(runs: dict[str, dict[int, dict]], variant: str, figure: str, form: str = ",.1f", unit: float = 1) -> str:
    values = [line[figure] for line in runs[variant].values() if line.get(figure) is not None]
    if not values:
        return ""
    times = ratio(runs, variant, figure)
    compared = "" if times is None or variant == DENSE else f" ({times:.2f} x)"
    return f"{median(values) / unit:{form}}{compared}"


def _left_out(lines: list[dict]) -> list[str]:
    told = {
        f"* {line['variant']} {line['kind']}: `{line['reason']}`": None
        for line in lines
        if line["kind"] in ("failed", "skipped")
    }
    return ["## Left out", "\n".join(told)] if told else []


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
