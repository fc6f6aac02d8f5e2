"""Writes what a study found: results.csv, pareto.csv, pareto.png, report.md and recipe.yaml.

report.md is made of plain tables; `summary` is the same for programs. All are of the same run: what it does not make, a
picture without matplotlib or a recipe without a budget, is removed where an earlier run has made it.
"""

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from vlmq_vllm.offline.checkpoint.atomic import aside
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep.designs import Widths, find_rises
from vlmq_vllm.offline.sweep.markdown import markdown
from vlmq_vllm.offline.sweep.mixtures import Mixture
from vlmq_vllm.offline.sweep.pareto import draw, pareto_front
from vlmq_vllm.offline.sweep.parts import Part
from vlmq_vllm.offline.sweep.results import COLUMNS

FILES = ("results.csv", "pareto.csv", "pareto.png", "recipe.yaml", "report.md")


@dataclass(frozen=True)
class Mixed:
    """What was found for a budget. rises: of the modules, by width, as measured. row: result of the mixture. recipe:
    settings of `vlmq quantize`."""

    method: str
    modules: list[Part]
    rises: list[dict[int, float]]
    mixture: Mixture
    row: dict
    recipe: dict


@dataclass(frozen=True)
class Study:
    """Everything that was run. about: model, data, calibration, number of questions. base: row of the model at 16 bits.
    rows: of all configurations. found: per method the rows of the design. shares: of the parts in the weights."""

    about: dict
    settings: StudySettings
    parts: list[Part]
    base: dict
    rows: list[dict]
    found: dict[str, dict[Widths, dict]]
    shares: list[float]
    mixed: Mixed | None

    def rises(self, method: str) -> list[dict[int, float]]:
        """KL of every part alone, by width."""
        return find_rises(len(self.parts), self.settings.bits, self.found[method])

    def pareto(self) -> list[dict]:
        """Rows on the Pareto front of bits per weight and KL, the narrowest first."""
        every = [*self.rows, self.base]
        return [every[i] for i in pareto_front([(row["bits_per_weight"], row["kl"]) for row in every])]


def write(folder: Path, study: Study) -> dict:
    """Write all files into `folder`; returns the summary."""
    pareto = study.pareto()
    makers: dict[str, Callable[[Path], object]] = {
        "results.csv": lambda path: _csv(path, [study.base, *study.rows]),
        "pareto.csv": lambda path: _csv(path, pareto),
        "report.md": lambda path: path.write_text(markdown(study, pareto), encoding="utf-8"),
    }
    if find_spec("matplotlib") is not None:
        makers["pareto.png"] = lambda path: draw(path, study.rows)
    if mixed := study.mixed:
        makers["recipe.yaml"] = lambda path: path.write_text(yaml.safe_dump(mixed.recipe, sort_keys=False))
    for name in FILES:
        if name in makers:
            with aside(folder / name) as partial:
                makers[name](partial)
        else:
            (folder / name).unlink(missing_ok=True)
    return summary(study, pareto)


def summary(study: Study, pareto: list[dict]) -> dict:
    """The study in JSON's types."""
    names = [part.name for part in study.parts]
    found = study.about | {
        "settings": asdict(study.settings),
        "parts": names,
        "full_precision": study.base,
        "rows": study.rows,
        "rises": {method: dict(zip(names, study.rises(method), strict=True)) for method in study.found},
        "pareto": pareto,
    }
    if mixed := study.mixed:
        modules = [part.name for part in mixed.modules]
        found["mixture"] = {
            "method": mixed.method,
            "widths": dict(zip(modules, mixed.mixture.widths, strict=True)),
            "rises": dict(zip(modules, mixed.rises, strict=True)),
            "sum_of_rises": mixed.mixture.rise,
            "pooled": mixed.mixture.pooled,
            "row": mixed.row,
        }
    return found


def _csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
