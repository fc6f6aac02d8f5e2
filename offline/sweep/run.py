"""Runs a study from model and data to report: pieces, then configurations, then what they say.

The full-precision model judges every configuration on held-out chats that are no calibration chats. What has been done
stands in the study's folder; a run that goes on does only what is missing, and may ask for more widths, methods and
parts, and for calibration where there was none.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch

from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.offline.data.inputs import load_processor
from vlmq_vllm.offline.data.read import check_exists
from vlmq_vllm.offline.machine.device import device_of
from vlmq_vllm.offline.model.source import Source, find
from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.settings.sweep import UNCALIBRATED, StudySettings
from vlmq_vllm.offline.sweep.held_out import read
from vlmq_vllm.offline.sweep.identity import identify
from vlmq_vllm.offline.sweep.judge import Judge
from vlmq_vllm.offline.sweep.knapsack import check_solver
from vlmq_vllm.offline.sweep.make_pieces import PieceMaker
from vlmq_vllm.offline.sweep.markdown import counted
from vlmq_vllm.offline.sweep.mixtures import Budget, recipe_of
from vlmq_vllm.offline.sweep.pareto import pareto_front
from vlmq_vllm.offline.sweep.parts import (
    Part,
    Widths,
    expand,
    find_parts,
    find_rises,
    find_subject,
    label_of,
    one_at_a_time,
)
from vlmq_vllm.offline.sweep.pieces import Pieces
from vlmq_vllm.offline.sweep.report import write
from vlmq_vllm.offline.sweep.results import Results, key_of
from vlmq_vllm.offline.sweep.sizes import Sizes


def sweep(
    model: str,
    data: str | Path,
    calibration: str | Path | None,
    out: Path,
    settings: StudySettings,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Study `model` (a folder or hub name) on the held-out chats `data`, and write the study's folder `out`.

    calibration: chats for the solver, of which none may be held out; methods that need none go without. stop: asked
    between units and configurations; when it says yes the run ends with StoppedError. A study that is resumed keeps its
    components unless others are asked for. Returns the report as JSON's types. Raises QuantizeError (RefusedError for
    what cannot be done) and CheckpointError.
    """
    if settings.budget:
        check_solver()
    if find_spec("matplotlib") is None:
        say('matplotlib is not installed (pip install ".[sweep]"): pareto.png is left out')
    if calibration is None and set(settings.methods) - set(UNCALIBRATED):
        named = " and ".join(UNCALIBRATED)
        raise QuantizeError(f"methods other than {named} need calibration data; give --calibration FILE.jsonl")
    check_exists(data)
    if calibration:
        check_exists(calibration)
    place = device_of(device)
    with Results(out, resume) as results:
        if settings.components is None and results.identity is not None:
            settings = replace(settings, components=tuple(results.identity.get("components", ())) or None)
        return _Run(model, settings, place, say, stop).run(data, calibration, results)


class _Run:
    """One run. `parts` are those of the study; `modules` those of the budget, empty without one."""

    def __init__(
        self,
        model: str,
        settings: StudySettings,
        device: torch.device,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:
        self.model, self.settings, self.device, self.say, self.stop = model, settings, device, say, stop
        self.source = Source(find(model))
        only = settings.components or (None if settings.by == "component" else ("language",))
        self.subject = find_subject(self.source, settings.of(settings.methods[0], settings.bits[0]), only)
        self.parts = find_parts(settings.by, self.subject)
        self.sizes = Sizes(self.source, self.subject.targets)
        self.modules = find_parts("module", self.subject) if settings.budget else []
        self.budget = Budget(self.subject, self.modules, settings.levels, settings.budget) if settings.budget else None
        self.processor = load_processor(self.source.folder)

    def run(self, data: str | Path, calibration: str | Path | None, results: Results) -> dict:
        settings, components = self.settings, self.subject.components
        found = read(data, calibration, self.source, self.processor, settings, components, self.say)
        results.begin(identify(self.source, settings, components, self.device, found.taught, found.asked))
        pieces = Pieces(results.folder / "pieces")
        for path in pieces.drop_damaged():
            self.say(f"{path} was damaged; it is made again when it is needed")
        kinds = {(m, b): settings.of(m, b) for m in settings.methods for b in settings.bits}
        maker = PieceMaker(self.source, self.subject, kinds, pieces, self.device, self.say, self.stop)
        maker.run(found.batches, found.probe)
        found.batches.clear()
        judging = CompareSettings(dtype=settings.dtype, device=str(self.device), max_new_tokens=0)
        self.results = results
        self.judge = Judge(self.source, self.subject, pieces, found.questions, self.processor, judging, self.device)
        pictured = sum(question.pictured for question in found.questions)
        questions, parts = counted(len(found.questions), "held-out question"), counted(len(self.parts), "part")
        self.say(f"{questions}, {pictured} with a picture; {parts} by {settings.by}")
        report = self._report(results, calibration is not None) | {
            "model": self.model,
            "data": str(data),
            "calibration": str(calibration) if calibration else None,
            "questions": len(found.questions),
            "pictured": pictured,
        }
        write(results.folder, report)
        return report

    def _report(self, results: Results, calibrated: bool) -> dict:
        """What was found, in JSON's types: rows of all configurations and of the model at 16 bits, the front of bits
        per weight and KL, and for every method and part the KL of this part alone, by width."""
        settings = self.settings
        base = self._row("none", "16 bits", {}, self.judge.full_precision())
        found = {method: self._evaluate(method, self.parts) for method in settings.methods}
        mixed = {"mixture": self._mix(self.budget, found, calibrated)} if self.budget else {}
        every = [*results.rows.values(), base]
        return {
            "settings": asdict(settings),
            "parts": [part.name for part in self.parts],
            "shares": self.sizes.shares(self.parts),
            "full_precision": base,
            "rows": every[:-1],
            "rises": {method: find_rises(self.parts, settings.bits, rows) for method, rows in found.items()},
            "pareto": [every[i] for i in pareto_front([(row["bits_per_weight"], row["kl"]) for row in every])],
            **mixed,
        }

    def _evaluate(self, method: str, parts: list[Part]) -> dict[Widths, dict]:
        """The rows of all configurations of these parts."""
        rows, design = {}, one_at_a_time(len(parts), self.settings.bits)
        for number, widths in enumerate(design, 1):
            linears, place = expand(parts, widths), f" {number} of {len(design)}"
            rows[widths] = self._judged(method, label_of(parts, widths), linears, place)
        return rows

    def _judged(self, method: str, label: str, linears: dict[str, int], place: str = "") -> dict:
        """The row of a configuration, which is run if it has not been."""
        row = self.results.find(method, linears)
        if row is None:
            if self.stop():
                raise StoppedError(f"stopped before {method}, {label}; add --resume to the same command to go on")
            begun = time.monotonic()
            row = self._row(method, label, linears, self.judge(method, linears))
            self.results.add(row)
            took = timedelta(seconds=round(time.monotonic() - begun))
            self.say(f"{method}{place}: {label}: KL {row['kl']:.3g}, in {took}")
        return row

    def _row(self, method: str, label: str, linears: dict[str, int], figures: dict) -> dict:
        return {
            "method": method,
            "key": key_of(linears),
            "label": label,
            "bits_per_weight": self.sizes.bits_per_weight(linears),
            "bits_per_parameter": self.sizes.bits_per_parameter(linears),
            **figures,
        }

    def _mix(self, budget: Budget, found: dict[str, dict[Widths, dict]], calibrated: bool) -> dict:
        """The best mixture within the budget by the method of which a random one is to be expected best. One method,
        since no checkpoint mixes them; which is best differs between widths."""
        bits = self.settings.bits

        def expected(method: str) -> float:
            return budget.expected({width: found[method][(width,) * len(self.parts)]["kl"] for width in bits})

        method = min(self.settings.methods, key=expected)
        self.say(f"budget: {len(self.modules)} modules by {method}")
        rises = find_rises(self.modules, bits, self._evaluate(method, self.modules))
        widths, rise, pooled = budget.mix(list(rises.values()))
        label = f"mixture within {self.settings.budget} bits"
        row = self._judged(method, label, expand(self.modules, widths)) | {"label": label}
        return {
            "method": method,
            "widths": dict(zip(rises, widths, strict=True)),
            "rises": rises,
            "sum_of_rises": rise,
            "pooled": pooled,
            "row": row,
            "recipe": recipe_of(self.subject, expand(self.modules, widths, kept=True), self.settings, calibrated),
        }
