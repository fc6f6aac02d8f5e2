"""Writes what a study found: results.csv, pareto.csv, pareto.png, report.md and recipe.yaml.

All are of the same run: what it does not make, a picture without matplotlib or a recipe without a budget, is removed
where an earlier run has made it.
"""

import csv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import yaml

from vlmq_vllm.offline.checkpoint.atomic import aside
from vlmq_vllm.offline.sweep.markdown import markdown
from vlmq_vllm.offline.sweep.pareto import draw
from vlmq_vllm.offline.sweep.results import COLUMNS

FILES = ("results.csv", "pareto.csv", "pareto.png", "recipe.yaml", "report.md")


def write(folder: Path, found: dict) -> None:
    """Write all files of a study (`run.py`) into `folder`."""
    makers: dict[str, Callable[[Path], object]] = {
        "results.csv": lambda path: _csv(path, [found["full_precision"], *found["rows"]]),
        "pareto.csv": lambda path: _csv(path, found["pareto"]),
        "report.md": lambda path: path.write_text(markdown(found), encoding="utf-8"),
    }
    if find_spec("matplotlib") is not None:
        makers["pareto.png"] = lambda path: draw(path, found["rows"])
    if mixture := found.get("mixture"):
        makers["recipe.yaml"] = lambda path: path.write_text(yaml.safe_dump(mixture["recipe"], sort_keys=False))
    for name in FILES:
        if name in makers:
            with aside(folder / name) as partial:
                makers[name](partial)
        else:
            (folder / name).unlink(missing_ok=True)


def _csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
