"""Reads the chats of a study: held-out questions, and calibration samples that are none of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.offline.compare.questions import Question, draw, end_ids, read_question
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.fingerprint import Marks, marks, shared
from vlmq_vllm.offline.data.inputs import has_vision, model_inputs
from vlmq_vllm.offline.data.processor import Processor
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.sweep import StudySettings


@dataclass(frozen=True)
class Chats:
    """questions: those that are short enough, in the order of the data. batches: as in a quantisation run. probe: the
    shortest calibration sample with a picture, None without calibration. taught, asked: fingerprints of the calibration
    and of all held-out chats."""

    questions: list[Question]
    batches: list[dict]
    probe: dict | None
    taught: list[str]
    asked: list[str]


def read(
    data: str | Path,
    calibration: str | Path | None,
    source: Source,
    processor: Processor,
    settings: StudySettings,
    components: list[str],
    say: Callable[[str], None],
) -> Chats:
    """Read both. Raises QuantizeError for chats that cannot be used or would say nothing of one of the `components`,
    RefusedError where a chat is in both."""
    held_out = draw(data, "held-out", settings.samples, settings.seed)
    ends = end_ids(source.folder, processor)
    questions = [read_question(chat, processor, ends) for chat in held_out]
    short = [q for q in questions if q.inputs(processor)[0]["input_ids"].shape[1] <= settings.max_tokens]
    check_usable(short, components, settings.max_tokens)
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
    return Chats(short, batched(samples), probe, [mark.chat for mark in taught], [mark.chat for mark in asked])


def check_usable(questions: list[Question], components: list[str], limit: int) -> None:
    """Raises QuantizeError where no chat is short enough, and none with a picture while a component is studied that
    nothing else reaches: its linears would seem to bear any width."""
    if not questions:
        raise QuantizeError(f"no held-out chat has at most {limit} tokens; raise --max-tokens")
    unreached = " and ".join(component for component in components if component != "language")
    if unreached and not any(question.pictured for question in questions):
        raise QuantizeError(
            f"no held-out chat with a picture has at most {limit} tokens, so that nothing is known of {unreached}; "
            "give --data with pictures, raise --max-tokens, or study --components language alone"
        )


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
