"""Draws the picture of the README: how far each method moves the demo model's answers at 2, 3 and 4 bits.

The figures are those of the committed results; the files of their names that end in .md say how they were measured.
One SVG with colours for light and dark pages; text stays text. No library is needed.
"""

import json
import math
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks/results"
RESULTS = tuple(
    FOLDER / f"{name}.jsonl" for name in ("2026-11-22-methods", "2026-11-30-cut-and-rotation", "2026-11-30-refine")
)
WIDTHS = (4, 3, 2)
# Name in the picture, and in the results.
METHODS = (
    ("RTN", "RTN"),
    ("AWQ", "AWQ"),
    ("MBQ", "MBQ"),
    ("QIG", "QIG"),
    ("Q-VLM", "Q-VLM"),
    ("GPTQ", "GPTQ"),
    ("GPTAQ", "GPTAQ"),
    ("VLMQ as published", "VLMQ on GPTAQ"),
    ("QEP", "aligned"),
    ("VLMQ on QEP (default)", "VLMQ on QEP, cut at 3"),
    ("the same, --refine 2", "VLMQ on QEP, refined"),
)
ROW, TOP, LEFT, RIGHT, WIDTH = 30, 92, 210, 32, 760
DECADES = (-1, 2)  # the axis runs from 10^-1 to 10^2, in 10^-3 nats
STYLE = """\
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #3d3d3a; }
  .title { font-size: 16px; font-weight: 600; fill: #141413; }
  .value, .tick { font-size: 11px; fill: #6b6a65; font-variant-numeric: tabular-nums; }
  .ours { font-weight: 600; fill: #141413; }
  .card { fill: #fcfcfb; stroke: #dddcd6; }
  .band { fill: #eeede8; }
  .grid { stroke: #e3e2dc; }
  .w4 { fill: #2a78d6; stroke: #2a78d6; } .w3 { fill: #159a6b; stroke: #159a6b; }
  .w2 { fill: #e0602b; stroke: #e0602b; }
  .spread { stroke-width: 2; stroke-linecap: round; opacity: 0.45; }
  @media (prefers-color-scheme: dark) {
    text { fill: #c9c8c2; } .title, .ours { fill: #ffffff; } .value, .tick { fill: #9b9a94; }
    .card { fill: #1a1a19; stroke: #3a3a37; } .band { fill: #2a2a28; } .grid { stroke: #33332f; }
    .w4 { fill: #5598ec; stroke: #5598ec; } .w3 { fill: #2bb583; stroke: #2bb583; }
    .w2 { fill: #f07f4f; stroke: #f07f4f; }
  }"""


def draw() -> str:
    """The SVG as text."""
    found = figures()
    height = TOP + ROW * len(METHODS) + 48
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="KL divergence to the 16-bit demo model by method at 2, 3 and 4 bits">',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        '<text class="title" x="20" y="32">How far answers move from those of the 16-bit model: less is better</text>',
        '<text class="value" x="20" y="52">KL divergence to the 16-bit demo model in 10⁻³ nats, 128 calibration chats; '
        "mean and standard deviation over seeds</text>",
        *_legend(),
        *_axis(height),
    ]
    for i, (name, _) in enumerate(METHODS):
        lines += _row(name, TOP + ROW * i + ROW / 2, [found[name, bits] for bits in WIDTHS])
    return "\n".join([*lines, "</svg>", ""])


def figures() -> dict[tuple[str, int], tuple[float, float]]:
    """Mean and standard deviation over seeds of the KL, in 10^-3 nats, by name in the picture and width."""
    by_name: dict[tuple[str, float], list[float]] = {}
    for line in (line for path in RESULTS for line in path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        by_name.setdefault((row["name"], row["bits"]), []).append(1e3 * row["kl"])
    found = {}
    for name, source in METHODS:
        for bits in WIDTHS:
            values = by_name[source, bits]
            found[name, bits] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def _row(name: str, y: float, values: list[tuple[float, float]]) -> list[str]:
    """A method: its name, and for each width a dot with its spread and its figure."""
    own = "default" in name
    lines = []
    if own:
        lines.append(f'<rect class="band" x="10" y="{y - ROW / 2:g}" width="{WIDTH - 20}" height="{ROW}" rx="4"/>')
    lines.append(f'<text {_class(own)}x="{LEFT - 14}" y="{y + 4.5:g}" text-anchor="end">{name}</text>')
    for bits, (mean, spread) in zip(WIDTHS, values, strict=True):
        x, low, high = _x(mean), _x(mean - spread), _x(mean + spread)
        lines.append(f'<line class="spread w{bits}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:g}" y2="{y:g}"/>')
        lines.append(f'<circle class="w{bits}" cx="{x:.1f}" cy="{y:g}" r="5"/>')
        lines.append(
            f'<text class="value" x="{max(x + 5, high) + 4:.1f}" y="{y + 4:g}">{mean:.{_places(mean)}f}</text>'
        )
    return lines


def _axis(height: int) -> list[str]:
    lines, bottom = [], height - 40
    for decade in range(DECADES[0], DECADES[1] + 1):
        x = _x(10**decade)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{bottom}"/>')
        lines.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{10**decade:g}</text>')
    return lines


def _legend() -> list[str]:
    lines = []
    for i, bits in enumerate(WIDTHS):
        x = LEFT + 6 + 90 * i
        lines.append(f'<circle class="w{bits}" cx="{x}" cy="74" r="5"/><text x="{x + 11}" y="78.5">{bits} bits</text>')
    return lines


def _class(own: bool) -> str:
    return 'class="ours" ' if own else ""


def _places(value: float) -> int:
    """Digits after the point that a figure is printed with."""
    return 2 if value < 2 else 1


def _x(value: float) -> float:
    """Where a figure lies on the logarithmic axis."""
    first, last = DECADES
    return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - first) / (last - first)
