"""A study from model and data to report: pieces, then configurations, then what they say.

The full-precision model judges every configuration on held-out chats that are no calibration chats. What has been done
stands in the study's folder; a run that goes on does only what is missing, and may ask for more widths, methods, parts
or designs.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.offline.compare.settings import Settings as Judging
from vlmq_vllm.offline.data.inputs import load_processor
from vlmq_vllm.offline.data.sources import check_exists
from vlmq_vllm.offline.device import device_of
from vlmq_vllm.offline.ranks import Ranks
from vlmq_vllm.offline.resume import identity
from vlmq_vllm.offline.settings import BITS
from vlmq_vllm.offline.source import Source, find
from vlmq_vllm.offline.study.chats import Chats, read
from vlmq_vllm.offline.study.designs import Widths, find_design
from vlmq_vllm.offline.study.importance import check_forest
from vlmq_vllm.offline.study.judge import Figures, Judge
from vlmq_vllm.offline.study.making import PieceMaker
from vlmq_vllm.offline.study.mixtures import Budget, recipe_of
from vlmq_vllm.offline.study.parts import Part, Subject, expand, find_parts, find_subject, label_of
from vlmq_vllm.offline.study.pieces import Pieces
from vlmq_vllm.offline.study.report import Mixed, Study, write
from vlmq_vllm.offline.study.results import Results, key_of
from vlmq_vllm.offline.study.settings import StudySettings
from vlmq_vllm.offline.study.sizes import Sizes

BLIND = 3  # mixtures that a budget's is compared with


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

    calibration: chats for the solver, of which none may be held out; only method "rtn" goes without. stop: asked
    between units and configurations; when it says yes the run ends with StoppedError. Returns the report as JSON's
    types. Raises QuantizeError (RefusedError for what cannot be done) and CheckpointError.
    """
    if settings.design != "one":
        check_forest()
    if find_spec("matplotlib") is None:
        say('matplotlib is not installed (pip install ".[sweep]"): pareto.png is left out')
    if calibration is None and set(settings.methods) != {"rtn"}:
        raise QuantizeError("methods other than rtn need calibration data; give --calibration FILE.jsonl")
    for source in filter(None, (data, calibration)):
        check_exists(source)
    return _Run(model, settings, device_of(device), say, stop).run(data, calibration, out, resume)


class _Run:
    """One run. `parts` are the parts of the design; `modules` those of the budget, empty without one."""

    def __init__(self, model: str, settings: StudySettings, device: torch.device, say, stop) -> None:
        self.model, self.settings, self.device, self.say, self.stop = model, settings, device, say, stop
        self.source = Source(find(model))
        only = settings.components or (None if settings.by == "component" else ("language",))
        self.subject: Subject = find_subject(self.source, settings.of("rtn", settings.bits[0]), only)
        self.parts = find_parts(settings.by, self.subject)
        self.design = find_design(settings.design, len(self.parts), settings.bits, settings.runs, settings.seed)
        self.sizes = Sizes(self.source, self.subject.targets)
        self.modules = find_parts("module", self.subject) if settings.budget else []
        self.budget = Budget(self.subject, self.modules, settings.levels, settings.budget) if settings.budget else None
        self.processor = load_processor(self.source.folder)

    def run(self, data: str | Path, calibration: str | Path | None, out: Path, resume: bool) -> dict:
        found = read(data, calibration, self.source, self.processor, self.settings, self.say)
        with Results(out, self._identity(found), resume) as results:
            pieces = Pieces(out / "pieces")
            kinds = {(m, b): self.settings.of(m, b) for m in self.settings.methods for b in self.settings.bits}
            PieceMaker(self.source, self.subject, kinds, pieces, self.device, self.say, self.stop).run(found.batches)
            found.batches.clear()
            judging = Judging(
                dtype=self.settings.dtype, device=str(self.device), new_tokens=0, max_tokens=self.settings.max_tokens
            )
            about = (pieces, found.questions, self.processor, judging, self.device)
            judge = Judge(self.source, self.subject, *about)
            self.say(f"{len(judge.questions)} held-out questions; {len(self.parts)} parts by {self.settings.by}")
            study = self._study(results, judge, data, calibration)
            return write(out, study)

    def _study(self, results: Results, judge: Judge, data: str | Path, calibration: str | Path | None) -> Study:
        base = self._row("none", "16 bits", {}, judge.full_precision())
        for method in self.settings.methods:
            self._evaluate(results, judge, method, self.parts, self.design)
        mixed = self._mix(results, judge) if self.budget else None
        return Study(
            about={
                "model": self.model,
                "data": str(data),
                "calibration": calibration and str(calibration),
                "questions": len(judge.questions),
            },
            settings=self.settings,
            parts=self.parts,
            base=base,
            rows=list(results.rows.values()),
            found={
                method: {widths: results.find(method, expand(self.parts, widths)) for widths in self.design}
                for method in self.settings.methods
            },
            shares=self.sizes.shares(self.parts),
            mixed=mixed,
        )

    def _evaluate(self, results: Results, judge: Judge, method: str, parts: list[Part], design: list[Widths]) -> None:
        """Run what has not been run."""
        for number, widths in enumerate(design, 1):
            linears = expand(parts, widths)
            if results.find(method, linears) is None:
                label = label_of(parts, widths)
                row = self._judged(judge, method, label, linears)
                results.add(row)
                self.say(f"{method} {number} of {len(design)}: {label}: KL {row['kl']:.3g}")

    def _judged(self, judge: Judge, method: str, label: str, linears: dict[str, int]) -> dict:
        if self.stop():
            raise StoppedError(f"stopped before {method}, {label}; add --resume to the same command to go on")
        return self._row(method, label, linears, judge(method, linears))

    def _row(self, method: str, label: str, linears: dict[str, int], figures: Figures) -> dict:
        return {
            "method": method,
            "key": key_of(linears),
            "label": label,
            "bits_per_weight": self.sizes.bits_per_weight(linears),
            "bits_per_parameter": self.sizes.bits_per_parameter(linears),
            **asdict(figures),
        }

    def _mix(self, results: Results, judge: Judge) -> Mixed:
        """The best mixture within the budget by the method that does best, and blind ones of its size."""
        bits, count = self.settings.bits, len(self.modules)
        narrow = expand(self.parts, (min(bits),) * len(self.parts))
        method = min(self.settings.methods, key=lambda method: results.find(method, narrow)["kl"])
        self.say(f"budget: {count} modules by {method}")
        self._evaluate(results, judge, method, self.modules, find_design("one", count, bits, 0, 0))
        rises = [
            {width: results.find(method, dict.fromkeys(module.linears, width))["kl"] for width in bits}
            for module in self.modules
        ]
        mixture = self.budget.mix(rises)
        blind = [self.budget.blind(self.settings.seed + i) for i in range(BLIND)]
        rows = []
        for label, widths in (
            ("mixture", mixture.widths),
            *((f"blind mixture {i}", w) for i, w in enumerate(blind, 1)),
        ):
            linears = expand(self.modules, widths)
            label = f"{label} within {self.settings.budget} bits"
            row = results.find(method, linears)
            if row is None:
                row = self._judged(judge, method, label, linears)
                results.add(row)
                self.say(f"{method}: {label}: KL {row['kl']:.3g}")
            rows.append(row | {"label": label})
        recipe = recipe_of(self.subject, expand(self.modules, mixture.widths, kept=True), method, self.settings)
        return Mixed(method, self.modules, rises, mixture, rows[0], rows[1:], recipe)

    def _identity(self, found: Chats) -> dict:
        """What decides the numbers. Not which widths, methods, parts and configurations there are: each is a row."""
        base = self.settings.of("gptq", max(BITS))  # one width for all studies, that takes every group size
        same = identity(self.source, base, found.taught, self.device, Ranks(self.device))
        left = {name: value for name, value in same.items() if name not in ("bits", "method", "threads", "processes")}
        return left | {
            "samples": len(found.taught),
            "max_pixels": self.settings.max_pixels,
            "held-out": hashlib.sha256("".join(found.asked).encode()).hexdigest(),
            "max_tokens": self.settings.max_tokens,
            "dtype": self.settings.dtype,
            "components": self.subject.components,
        }
