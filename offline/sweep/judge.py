"""Judges configurations on held-out questions: the whole model is in memory, and its linears are exchanged.

The figures are those of `vlmq compare` (`compare/scores.py`, `compare/report.py`): for every sample the mean over its
answer tokens, then the mean over samples.
"""

import math
import statistics

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.compare.hf import score_one
from vlmq_vllm.offline.compare.questions import Question
from vlmq_vllm.offline.compare.report import sample_row
from vlmq_vllm.offline.compare.scores import Score
from vlmq_vllm.offline.data.processor import Processor
from vlmq_vllm.offline.model.layers import put, set_parameter
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.settings.quantize import KEPT
from vlmq_vllm.offline.sweep.parts import Subject
from vlmq_vllm.offline.sweep.pieces import Pieces

KEEP = 1 << 30  # bytes of prepared inputs that stay in memory; those of further questions are made anew every time


class Judge:
    """Scores of the full-precision model, found once, and the model that is changed."""

    def __init__(
        self,
        source: Source,
        subject: Subject,
        pieces: Pieces,
        questions: list[Question],
        processor: Processor,
        settings: CompareSettings,
        device: torch.device,
    ) -> None:
        self.source, self.pieces, self.processor, self.settings = source, pieces, processor, settings
        self.questions = questions
        self.targets = {target.name: (target, subject.unit_of(target)) for target in subject.targets}
        self.dtype, self.device = getattr(torch, settings.dtype), device
        self.now: dict[str, tuple[str, int]] = {}  # linear -> method and width of the weight that it has
        self.kept: dict[int, tuple[dict, int]] = {}  # by id of the question
        self.room = KEEP
        materialise(source, device, self.dtype)
        self.teacher = [self._score(question, None) for question in questions]

    def full_precision(self) -> dict[str, float | None]:
        """The figures of the model itself."""
        return self._figures(self.teacher)

    def __call__(self, method: str, widths: dict[str, int]) -> dict[str, float | None]:
        """The figures with these linears (in-memory names) at these widths and all others at 16 bits."""
        self._exchange({linear: (method, bits) for linear, bits in widths.items() if bits != KEPT})
        return self._figures([self._score(*each) for each in zip(self.questions, self.teacher, strict=True)])

    def _exchange(self, wanted: dict[str, tuple[str, int]]) -> None:
        for linear in self.targets.keys() & (self.now.keys() | wanted.keys()):
            kind = wanted.get(linear)
            if kind == self.now.get(linear):
                continue
            target, unit = self.targets[linear]
            weight = self.pieces.read(kind, unit, target) if kind else self.source.parameter(f"{linear}.weight")
            put(self.source.model, linear, weight.to(self.device, self.dtype))
        self.now = wanted

    def _score(self, question: Question, teacher: Score | None) -> Score:
        found = self.kept.get(id(question))
        if found is None:
            found = question.inputs(self.processor)
            size = sum(value.nbytes for value in found[0].values())
            if size <= self.room:
                self.kept[id(question)] = found
                self.room -= size
        inputs, start = found
        return score_one(self.source.model, inputs, start, question.answer, set(), self.settings, teacher)

    def _figures(self, scores: list[Score]) -> dict[str, float | None]:
        """kl: KL(16 bits || configuration) in nats per answer token; kl_error: its standard error over samples, None
        for a single one. nll: negative log-likelihood of the answer in nats per token. exact: share of answers of which
        every token is the likeliest."""
        rows = [sample_row(*each) for each in zip(self.questions, self.teacher, scores, strict=True)]
        kl = [row["kl"] for row in rows]
        if not all(map(math.isfinite, kl)):
            raise QuantizeError(
                f"the model answers with NaN or infinity in {self.settings.dtype}; take --dtype float32 or bfloat16"
            )
        return {
            "kl": statistics.fmean(kl),
            "kl_error": statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else None,
            "nll": statistics.fmean(row["nll_student"] for row in rows),
            "exact": statistics.fmean(row["exact_student"] for row in rows),
        }


def materialise(source: Source, device: torch.device, dtype: torch.dtype) -> None:
    """Load every parameter of the model; tied ones share theirs as in the skeleton, or the input embeddings'."""
    loaded: dict[int, torch.nn.Parameter] = {}  # by the id of the skeleton's
    for name, skeleton in list(source.model.named_parameters(remove_duplicate=False)):
        if id(skeleton) not in loaded:
            stored = name if name in source.places else f"{source.family.embed}.weight"
            value = source.parameter(stored).to(device, dtype)
            loaded[id(skeleton)] = torch.nn.Parameter(value, requires_grad=False)
        set_parameter(source.model, name, loaded[id(skeleton)])
    source.model.to(device)
