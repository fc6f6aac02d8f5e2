"""Draws the pictures of results: how far each method moves a model's answers, on the real language model and the demo.

The figures are those of the committed results; the files of their names that end in .md say how they were measured.
One SVG each, with colours for light and dark pages; text stays text. No library is needed.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks/results"
ROW, TOP, LEFT, RIGHT, WIDTH = 30, 110, 210, 32, 760
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
Figures = dict[tuple[str, int], tuple[float, float]]  # (name in the results, bits): mean and spread


@dataclass(frozen=True)
class Panel:
    """One axis of a picture: its heading, the figures on it, and the decades that it runs from and to."""

    heading: str
    found: Figures
    first: int
    last: int


@dataclass(frozen=True)
class Picture:
    """A row for each method: its name in the picture and in the results; `ours` are set off."""

    title: str
    note: str
    methods: tuple[tuple[str, str], ...]
    ours: tuple[str, ...]
    widths: tuple[int, ...]
    panels: tuple[Panel, ...]

    def draw(self) -> str:
        """The SVG as text."""
        height = TOP + ROW * len(self.methods) + 48
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'aria-label="{self.title}: {", ".join(name for name, _ in self.methods)}">',
            f"<style>\n{STYLE}\n</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            f'<text class="title" x="20" y="32">{self.title}</text>',
            f'<text class="value" x="20" y="52">{self.note}</text>',
            *self._legend(),
        ]
        for i, (name, _) in enumerate(self.methods):
            lines += self._name(name, TOP + ROW * i + ROW / 2)
        space = (WIDTH - LEFT - RIGHT) / len(self.panels)
        for i, panel in enumerate(self.panels):
            lines += self._panel(panel, LEFT + space * i, LEFT + space * (i + 1) - 40 * (i + 1 < len(self.panels)))
        return "\n".join([*lines, "</svg>", ""])

    def _legend(self) -> list[str]:
        lines = []
        for i, bits in enumerate(self.widths):
            x = 26 + 62 * i
            lines.append(
                f'<circle class="w{bits}" cx="{x}" cy="80" r="5"/><text x="{x + 11}" y="84.5">{bits} bits</text>'
            )
        return lines

    def _name(self, name: str, y: float) -> list[str]:
        band = f'<rect class="band" x="10" y="{y - ROW / 2:g}" width="{WIDTH - 20}" height="{ROW}" rx="4"/>'
        bold = 'class="ours" ' if name in self.ours else ""
        text = f'<text {bold}x="{LEFT - 14}" y="{y + 4.5:g}" text-anchor="end">{name}</text>'
        return [band, text] if bold else [text]

    def _panel(self, panel: Panel, left: float, right: float) -> list[str]:
        """The axis between two borders, and for each method and width a dot with its spread and its figure."""
        unit = (right - left) / (panel.last - panel.first)

        def x(value: float) -> float:
            return left + unit * (math.log10(max(value, 10.0**panel.first)) - panel.first)

        bottom = TOP + ROW * len(self.methods) + 8
        lines = [f'<text x="{left:.1f}" y="84.5">{panel.heading}</text>']
        for decade in range(panel.first, panel.last + 1):
            at = x(10.0**decade)
            lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 4}" y2="{bottom}"/>')
            tick = f'x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{10.0**decade:g}'
            lines.append(f'<text class="tick" {tick}</text>')
        for i, (_, source) in enumerate(self.methods):
            for bits in self.widths:
                if (source, bits) in panel.found:
                    lines += _dot(*panel.found[source, bits], TOP + ROW * i + ROW / 2, bits, x)
        return lines


def _dot(mean: float, spread: float, y: float, bits: int, x: Callable[[float], float]) -> list[str]:
    low, high, digits = x(mean - spread), x(mean + spread), 2 if mean < 2 else 1
    return [
        f'<line class="spread w{bits}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:g}" y2="{y:g}"/>',
        f'<circle class="w{bits}" cx="{x(mean):.1f}" cy="{y:g}" r="5"/>',
        f'<text class="value" x="{max(x(mean) + 5, high) + 4:.1f}" y="{y + 4:g}">{mean:.{digits}f}</text>',
    ]


def figures(names: tuple[str, ...], figure: str, unit: float = 1.0) -> Figures:
    """Means over seeds of a figure in result files, and as spread the standard deviation over seeds or the standard
    error over chats, the larger where both are known; divided by `unit`."""
    rows: dict[tuple[str, int], list[dict]] = {}
    for line in (line for name in names for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()):
        row = json.loads(line)
        rows.setdefault((row["name"], row["bits"]), []).append(row)
    found = {}
    for key, own in rows.items():
        values = [row[figure] / unit for row in own]
        error = statistics.mean(row.get(f"{figure}_error", 0.0) / unit for row in own)
        found[key] = statistics.mean(values), max(error, statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


def demo() -> str:
    """The demo model at 2, 3 and 4 bits."""
    names = ("2026-11-22-methods", "2026-11-30-cut-and-rotation", "2026-11-30-refine", "2026-11-30-damp")
    return Picture(
        "How far answers move from those of the 16-bit model: less is better",
        "The demo model, 128 calibration chats; mean and standard deviation over seeds",
        (
            ("RTN", "RTN"),
            ("AWQ", "AWQ"),
            ("MBQ", "MBQ"),
            ("QIG", "QIG"),
            ("Q-VLM", "Q-VLM"),
            ("GPTQ", "GPTQ"),
            ("GPTAQ", "GPTAQ"),
            ("VLMQ as published", "VLMQ on GPTAQ"),
            ("QEP", "aligned"),
            ("VLMQ, --damp 0.01", "VLMQ on QEP, refined"),
            ("VLMQ (default)", "VLMQ (default), damp 0.1"),
        ),
        ("VLMQ (default)",),
        (4, 3, 2),
        (Panel("KL divergence in 10⁻³ nats", figures(names, "kl", 1e-3), -1, 2),),
    ).draw()


def real() -> str:
    """The real language model at 2 and 3 bits, on text and on pictures."""
    names = ("2026-11-30-real-lm", "2026-12-01-real-lm")
    return Picture(
        "How far answers move from those of the 16-bit model: less is better",
        "SmolLM2-135M taught pictures; KL divergence in nats, one to three seeds, mean and spread",
        (
            ("GPTQ", "GPTQ"),
            ("QEP", "QEP"),
            ("AutoRound, 50 iterations", "AutoRound, 50 iterations"),
            ("AutoRound", "AutoRound"),
            ("VLMQ (default)", "VLMQ (default)"),
            ("VLMQ, --rotate", "VLMQ (default), rotated"),
        ),
        ("VLMQ (default)", "VLMQ, --rotate"),
        (3, 2),
        (
            Panel("text", figures(names, "text_kl"), -1, 1),
            Panel("pictures", figures(names, "picture_kl"), -2, 1),
        ),
    ).draw()
