"""Draws the calibration samples of a run, as batches with what is known of their tokens."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.fingerprint import fingerprint
from vlmq_vllm.offline.data.inputs import Intake, has_vision, load_processor, model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.data.token_kinds import answer_labels, token_kinds, vision_ids
from vlmq_vllm.offline.machine.progress import Progress
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.quantize import Settings

KINDS_KEY = "token_kinds"


@dataclass
class Samples:
    """batches: this process's share. kinds [B, T] int8, labels [B, T] int64: of each batch's tokens as `token_kinds.py`
    has them, where a method asks. probe: the shortest sample with a picture. fingerprints: of all processes' samples.
    """

    batches: list[dict] = field(default_factory=list)
    kinds: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)
    probe: dict | None = None
    fingerprints: list[str] = field(default_factory=list)


def read_samples(data: str | Path, source: Source, settings: Settings, ranks: Ranks, progress: Progress) -> Samples:
    """Draw the samples of a run. Raises QuantizeError for data without pictures or with chats that cannot be read."""
    intake, found = Intake(), Samples()
    chats, processor = read_chats(data, settings.seed), load_processor(source.folder)
    samples = []
    for chat, inputs in model_inputs(
        chats, processor, settings.samples, settings.max_tokens, settings.max_pixels or None, intake
    ):
        samples.append(inputs)
        if settings.needs_labels:
            ids = inputs["input_ids"]
            inputs[KINDS_KEY] = token_kinds(chat, ids[0].tolist(), processor, vision_ids(source.config))[None]
        found.fingerprints.append(fingerprint(chat))
    progress.say(_told(intake, settings.samples, sum(inputs["input_ids"].shape[1] for inputs in samples)))
    probe = min(filter(has_vision, samples), key=lambda inputs: inputs["input_ids"].shape[1])
    found.probe = {name: value for name, value in probe.items() if name != KINDS_KEY}
    found.batches = ranks.own(batched(samples))
    if settings.needs_labels:
        found.kinds = [batch.pop(KINDS_KEY) for batch in found.batches]
        pairs = zip(found.batches, found.kinds, strict=True)
        found.labels = [answer_labels(batch["input_ids"], kinds) for batch, kinds in pairs]
    return found


def _told(intake: Intake, wanted: int, tokens: int) -> str:
    notes = [
        (intake.used < wanted, f"asked for {wanted}: there are no more that fit"),
        (intake.too_long, f"{intake.too_long} left out for their length"),
        (intake.shrunk, f"{intake.shrunk} pictures shrunk"),
    ]
    noted = "".join(f"; {note}" for holds, note in notes if holds)
    return f"calibrating with {intake.used} samples, {tokens} tokens{noted}"
