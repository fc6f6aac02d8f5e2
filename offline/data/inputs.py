"""Turns chats into inputs of the model by its own template and processor, one sample at a time, never padded.

A sample longer than the limit is left out whole: a cut inside a picture's tokens would leave features without tokens.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.pictures import open_image, open_video, shrink
from vlmq_vllm.offline.data.processor import Processor


@dataclass
class Intake:
    """used, too_long: samples given out, and samples left out for their length. shrunk: pictures and frames of used
    samples that were made smaller. lengths: tokens of every sample looked at, used or not, in order."""

    used: int = 0
    too_long: int = 0
    shrunk: int = 0
    lengths: list[int] = field(default_factory=list)


def load_processor(folder: Path) -> Processor:
    """The model's own processor. Raises QuantizeError when its files are missing or damaged."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise QuantizeError(f"the processor of {folder} needs a package that is not installed ({reason})") from error
    except Exception as error:  # whatever damaged files make of transformers
        reason = str(error).partition("\n")[0]
        raise QuantizeError(f"{folder} has no usable processor files ({reason}); copy the model again") from error


def model_inputs(
    chats: list[dict],
    processor: Processor,
    limit: int,
    max_tokens: int,
    max_pixels: int | None = None,
    intake: Intake | None = None,
    pictured: bool = True,
) -> Iterator[tuple[dict, dict[str, torch.Tensor]]]:
    """(chat, its inputs as the processor makes them) for at most `limit` chats that have at most `max_tokens` tokens.

    Raises QuantizeError for a chat that the processor refuses, and if they must be `pictured` when none has a picture.
    """
    for name, value in (("samples", limit), ("max_tokens", max_tokens), ("max_pixels", max_pixels)):
        if value is not None and value < 1:
            raise QuantizeError(f"{name} is {value}; it must be at least 1")
    intake, missing = intake or Intake(), pictured
    for chat in chats:
        if intake.used == limit:
            break
        inputs, shrunk = prepare(chat, processor, max_pixels)
        intake.lengths.append(inputs["input_ids"].shape[1])
        if intake.lengths[-1] > max_tokens:
            intake.too_long += 1
            continue
        intake.used += 1
        intake.shrunk += shrunk
        missing = missing and not has_vision(inputs)
        yield chat, inputs
    if missing:
        drawn = f"none of the {intake.used} samples drawn, of at most {max_tokens} tokens, has a picture"
        advice = "raise --max-tokens, or shrink pictures with --max-pixels" if intake.too_long else "raise --samples"
        raise QuantizeError(f"{drawn}; {advice}")


def has_vision(inputs: dict[str, torch.Tensor]) -> bool:
    return any(name.startswith("pixel_values") for name in inputs)


def prepare(chat: dict, processor: Processor, max_pixels: int | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """The whole chat as inputs (input_ids int64 [1, T] and the processor's own), and how many pictures were shrunk."""
    _refuse_special_tokens(chat, processor.tokenizer.all_special_tokens)
    if chat["videos"] and getattr(processor, "video_processor", None) is None:
        raise QuantizeError(f"{chat['line']} has a video, and the model's processor takes none; leave it out")
    images = [open_image(place) for place in chat["images"]]
    opened = [open_video(place, processor) for place in chat["videos"]]
    videos = [frames for frames, _ in opened]
    small, *small_videos = [[shrink(image, max_pixels) for image in group] for group in (images, *videos)]
    shrunk = sum(map(operator.is_not, chain(images, *videos), chain(small, *small_videos)))
    options: dict[str, Any] = {}
    if videos:
        metadata = [about for _, about in opened]
        options = {"videos": small_videos, "video_metadata": metadata, "do_sample_frames": False}
    try:
        text = render(chat["messages"], processor)
        inputs = processor(
            text=[text], images=small or None, return_tensors="pt", **options, **tokenizing(text, processor)
        )
    except Exception as error:  # templates and processors raise what they like
        raise QuantizeError(f"{chat['line']}: the model's processor refuses it ({error!r:.200})") from error
    return dict(inputs), shrunk


def render(messages: list[dict], processor: Processor) -> str:
    return processor.apply_chat_template(messages, tokenize=False)


def tokenizing(text: str, processor: Processor) -> dict[str, bool]:
    """Options of the tokenizer: where the template wrote the first token, the tokenizer must not add it once more."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if first and text.startswith(first) else {}


def _refuse_special_tokens(chat: dict, special: list[str]) -> None:
    """A place holder in a text would stand for a picture that is not there."""
    for part in (part for message in chat["messages"] for part in message["content"]):
        for token in special:
            if token in part.get("text", ""):
                raise QuantizeError(f"{chat['line']}: the text {part['text'][:80]!r} holds {token}; remove it")
