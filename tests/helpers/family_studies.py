"""What a study of a tiny model of `family_models.py` is given: the model, calibration chats, held-out chats."""

from dataclasses import dataclass
from pathlib import Path

import torch

from family_models import build
from family_samples import write_chats
from vlmq_vllm.offline.data.inputs import load_processor
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep.held_out import read
from vlmq_vllm.offline.sweep.make_pieces import PieceMaker
from vlmq_vllm.offline.sweep.parts import find_subject
from vlmq_vllm.offline.sweep.pieces import Pieces


@dataclass(frozen=True)
class Given:
    """model: a folder. calibration: three chats with pictures. held_out: one with a picture, one without. text: the
    one without."""

    model: Path
    calibration: Path
    held_out: Path
    text: Path


def build_study(name: str, folder: Path) -> Given:
    """Write everything into `folder`."""
    build(name, folder / "model")
    lines = write_chats(folder).read_text().splitlines()
    asked = lines[0].replace("What is the colour?", "Which colour?")
    given = {"calibration": lines[:3], "held_out": [asked, lines[3]], "text": lines[3:]}
    for part, chats in given.items():
        (folder / f"{part}.jsonl").write_text("\n".join(chats))
    return Given(folder / "model", *(folder / f"{part}.jsonl" for part in given))


def make_pieces(given: Given, settings: StudySettings, out: Path, components: tuple[str, ...]) -> Pieces:
    """The pieces of a study, which is taken no further."""
    source, cpu = Source(given.model), torch.device("cpu")
    subject = find_subject(source, settings.of("rtn", settings.bits[0]), components)
    processor = load_processor(given.model)
    chats = read(given.held_out, given.calibration, source, processor, settings, subject.components, lambda line: None)
    kinds = {(method, bits): settings.of(method, bits) for method in settings.methods for bits in settings.bits}
    pieces = Pieces(out)
    PieceMaker(source, subject, kinds, pieces, cpu, lambda line: None, lambda: False).run(chats.batches, chats.probe)
    return pieces
