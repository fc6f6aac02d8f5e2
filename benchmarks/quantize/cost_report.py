"""Writes the results of `cost.py` as markdown: one table per problem, then versions, settings and the command.

Ratios are a peer's "quantise" part, which leaves out its loading and saving, over ours, which holds everything after
the imports. They are therefore on the low side.
"""

import datetime
import os
import sys
from pathlib import Path
from statistics import median

from benchmarks.provenance import processor, public

TITLES = {
    "demo": "The demo model (Qwen2-VL architecture, 4 decoder layers, hidden 256)",
    "7b-layer": "One decoder layer of Qwen2-VL-7B's shape (random weights, small vision tower and vocabulary)",
    "2b": "Qwen2-VL-2B's shape, all of it (random weights)",
}
OURS = ("vlmq", "gptq")
TIMES = ("process, s", "quantise, s", "from - to", "CPU, s", "x vlmq", "x gptq")
HEAD = ("tool", "runs", *TIMES, "peak RSS, MB", "imports, MB")
HIDDEN = ("--work", "--peers", "--out")  # options that name folders of one machine


def result_file(folder: Path, shapes: list[str] | None) -> Path:
    name = "-".join(["quantize", *(shapes or [])])
    return folder / f"{datetime.date.today()}-{name}.md"


def markdown(results: dict[str, dict], problems: dict, threads: int) -> str:
    """`results`: problem -> what quantize.measure found."""
    parts = [_head(threads)]
    for shape, found in results.items():
        parts += [f"## {TITLES[shape]}", _samples(found, problems[shape]), _table(found["runs"])]
        parts += [f"{tool} did not run: `{error}`" for tool, error in found["errors"].items()]
        parts += _busy(found["runs"], threads) + _memory(found)
    return "\n\n".join([*parts, "## Versions and settings", _settings(results)]) + "\n"


def _head(threads: int) -> str:
    cores = len(os.sched_getaffinity(0))
    return (
        f"# Quantising beside the peers, {datetime.date.today()}\n\n"
        f"Processor: {processor()}, {cores} of {os.cpu_count()} cores, {threads} threads; no GPU. "
        "Medians; tools in turn within every repetition.\n"
        "`process`: from start to exit. `quantise`: calibration and solve; for vlmq and gptq (both `vlmq quantize`) "
        "with reading the model and writing the checkpoint.\n`CPU`: processor time of `quantise`. `x`: `quantise` over "
        "that of ours. `imports`: resident memory before any model is opened.\n\n"
        f"    python benchmarks/quantize/cost.py {' '.join(public(sys.argv[1:], HIDDEN))}".rstrip()
    )


def _samples(found: dict, problem) -> str:
    lines = [line for runs in found["runs"].values() for line in runs]
    tokens = {line["settings"]["tokens"] for line in lines if "tokens" in line["settings"]}
    counted = f", {' or '.join(f'{count:,}' for count in sorted(tokens))} tokens" if tokens else ""
    linears = sorted({line["linears"] for line in lines})
    written = f"; packed linears written: {' or '.join(map(str, linears))}" if linears else ""
    return f"{problem.samples} samples{counted}{written}."


def _table(runs: dict[str, list[dict]]) -> str:
    ours = {tool: _median(runs[tool], "quantise") for tool in OURS if runs.get(tool)}
    rows = [HEAD, ("---", *["---:"] * (len(HEAD) - 1))]
    rows += [_row(tool, lines, ours) for tool, lines in runs.items() if lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(tool: str, lines: list[dict], ours: dict[str, float]) -> tuple[str, ...]:
    seconds = [line["seconds"]["quantise"] for line in lines]
    return (
        tool,
        str(len(lines)),
        f"{median(line['process_seconds'] for line in lines):.1f}",
        f"{median(seconds):.1f}",
        f"{min(seconds):.1f} - {max(seconds):.1f}",
        f"{median(line['cpu_seconds']['quantise'] for line in lines):.1f}",
        *(f"{median(seconds) / ours[other]:.2f}" if other in ours else "" for other in OURS),
        f"{max(line['peak_rss_bytes'] for line in lines) / 1e6:,.0f}",
        f"{median(line['import_rss_bytes'] for line in lines) / 1e6:,.0f}",
    )


def _median(lines: list[dict], part: str) -> float:
    return median(line["seconds"][part] for line in lines)


def _busy(runs: dict[str, list[dict]], threads: int) -> list[str]:
    """With one thread the wall shows at once whether others used the core: then only `CPU` can be compared."""
    lines = [line for lines in runs.values() for line in lines]
    waited = [line["seconds"]["quantise"] > 1.2 * line["cpu_seconds"]["quantise"] for line in lines]
    if threads > 1 or not any(waited):
        return []
    return [
        f"**{sum(waited)} of {len(lines)} runs waited for a busy core: their seconds are no measure, compare `CPU`.**"
    ]


def _memory(found: dict) -> list[str]:
    """What `vlmq plan` said, where it was asked."""
    if found["predicted"] is None:
        return []
    if isinstance(found["predicted"], str):
        return [f"`vlmq plan` gave no figure: `{found['predicted']}`"]
    return [f"`vlmq plan` foretold a peak of {found['predicted'] / 1e6:,.0f} MB for vlmq."]


def _settings(results: dict[str, dict]) -> str:
    lines = {}
    for found in results.values():
        for tool, runs in found["runs"].items():
            for line in runs:
                settings = {k: v for k, v in line["settings"].items() if k != "tokens"}
                told = ", ".join(f"{name} {value}" for name, value in settings.items())
                versions = ", ".join(f"{name} {value}" for name, value in line["versions"].items())
                lines[f"* {tool}: {told}; {versions}"] = None
    return "\n".join(lines)
