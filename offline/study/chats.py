"""The chats of a study: held-out questions, and calibration samples that are none of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.offline.batches import batched
from vlmq_vllm.offline.compare.questions import Question, end_ids, read_question
from vlmq_vllm.offline.data.fingerprint import Marks, marks, shared
from vlmq_vllm.offline.data.inputs import has_vision, model_inputs
from vlmq_vllm.offline.data.sources import read_all, read_chats
from vlmq_vllm.offline.source import Source
from vlmq_vllm.offline.study.settings import StudySettings


@dataclass(frozen=True)
class Chats:
    """questions: in the order of the data. batches: as in a quantisation run. probe: the shortest calibration sample
    with a picture, None without calibration. taught, asked: fingerprints of the calibration and of the held-out
    chats."""

    questions: list[Question]
    batches: list[dict]
    probe: dict | None
    taught: list[str]
    asked: list[str]


def read(
    data: str | Path,
    calibration: str | Path | None,
    source: Source,
    processor,
    settings: StudySettings,
    components: list[str],
    say: Callable[[str], None],
) -> Chats:
    """Read both. Raises QuantizeError for a chat that cannot be used and for chats without pictures where one of the
    `components` needs some, RefusedError where a chat is in both."""
    held_out = read_all(data)
    if not held_out:
        raise QuantizeError(f"{data} holds no chat; give held-out data with one chat per line")
    if settings.samples is not None and settings.samples < len(held_out):
        held_out = random.Random(settings.seed).sample(held_out, settings.samples)
    ends = end_ids(source.folder, processor)
    questions = [read_question(chat, processor, ends) for chat in held_out]
    count_pictured(questions, components)
    taught, samples = [], []
    if calibration is not None:
        drawn = read_chats(calibration, settings.seed)
        options = (settings.calibration_samples, settings.max_tokens, settings.max_pixels or None)
        for chat, inputs in model_inputs(drawn, processor, *options):
            taught.append(marks(chat))
            samples.append(inputs)
        say(f"calibrating with {len(samples)} samples, {sum(s['input_ids'].shape[1] for s in samples)} tokens")
    asked = [marks(chat) for chat in held_out]
    check_disjoint(taught, asked, say)
    probe = min(filter(has_vision, samples), key=lambda inputs: inputs["input_ids"].shape[1], default=None)
    return Chats(questions, batched(samples), probe, [mark.chat for mark in taught], [mark.chat for mark in asked])


def count_pictured(
    questions: list[Question], components: list[str], among: str = "", advice: str = "give --data with pictures"
) -> int:
    """How many have a picture or a video. Raises QuantizeError where none has and a component is studied that nothing
    else reaches: its linears would seem to bear any width. among: which chats they are, for the message."""
    found = sum(bool(question.chat["images"] or question.chat["videos"]) for question in questions)
    unreached = [component for component in components if component != "language"]
    if unreached and not found:
        raise QuantizeError(
            f"none of the {len(questions)} held-out chats{among} has a picture, so that nothing is known of "
            f"{' and '.join(unreached)}; {advice}, or study --components language alone"
        )
    return found


def check_disjoint(taught: list[Marks], asked: list[Marks], say: Callable[[str], None]) -> None:
    """Raises RefusedError for a calibration chat that is held out too; says so where only pictures are shared."""
    chats, pictures = shared(taught, asked)
    if chats:
        raise RefusedError(
            f"{len(chats)} of {len(taught)} calibration chats are held out too, such as {chats[0]}; give --calibration "
            "and --data without common chats"
        )
    if pictures:
        say(
            f"warning: {len(pictures)} of {len(taught)} calibration chats share a picture with the held-out ones, such "
            f"as {pictures[0]}; the figures look better than on others"
        )
