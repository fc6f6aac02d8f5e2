"""Calibration samples: chats with images from a JSONL file, as inputs of the model, one at a time and never padded.

A line is `{"messages": [{"role": ..., "content": ...}]}` in the shape of OpenAI and Hugging Face. `content` is a string
or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image": PATH}`, or `{"type": "image_url",
"image_url": {"url": PATH or data: URL}}`. A bare `{"type": "image"}` takes the next of the line's own `"images"`.
Paths are relative to the file. A sample longer than the limit is left out whole: a cut inside a picture's tokens would
leave features without tokens.
"""

import base64
import binascii
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from vlmq_vllm.errors import QuantizeError


def read_chats(path: Path, seed: int) -> list[dict]:
    """All lines of `path` in an order that `seed` decides. Raises QuantizeError for a bad line or when none has images.

    A chat is {"messages": [...], "images": [...], "line": n}: every image part is {"type": "image"}, pictures in order.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"cannot read calibration data {path} ({error}); give a JSONL file of chats") from None
    chats = [_chat(path, i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not any(chat["images"] for chat in chats):
        raise QuantizeError(
            f"none of the {len(chats)} samples in {path} has an image; a vision-language model must be calibrated "
            'with images: add {"type": "image", "image": "FILE"} to the content of user messages'
        )
    random.Random(seed).shuffle(chats)
    return chats


def _chat(path: Path, number: int, line: str) -> dict:
    try:
        entry = json.loads(line)
        messages, given = entry["messages"], list(entry.get("images", []))
        images, normal = [], []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            normal.append({"role": message["role"], "content": [_part(part, given, images) for part in parts]})
        places = [_locate(path, number, image) for image in images]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise QuantizeError(
            f'{path} line {number} is no chat ({type(error).__name__}: {error}); expected {{"messages": [...]}}'
        ) from None
    return {"messages": normal, "images": places, "line": f"{path} line {number}"}


def _part(part: dict, given: list, images: list) -> dict:
    """The part as chat templates expect it; an image's place goes to `images`."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] not in ("image", "image_url"):
        raise KeyError(f"unknown part type {part['type']!r}")
    place = part.get("image") or part.get("image_url") or given.pop(0)
    images.append(place["url"] if isinstance(place, dict) else place)
    return {"type": "image"}


def _locate(path: Path, number: int, image: str) -> str | Path:
    if image.startswith("data:"):
        return image
    if image.startswith(("http:", "https:")):
        raise QuantizeError(f"{path} line {number} names {image[:80]}; pictures are not fetched, download it first")
    file = path.parent / image.removeprefix("file://")
    if len(image) > 4096 or not file.is_file():
        raise QuantizeError(
            f"{path} line {number} names the image {image[:80]}, no such file; paths start at {path.parent}"
        )
    return file


def open_image(place: str | Path):
    """The RGB picture at a path or in a data: URL."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = io.BytesIO(base64.b64decode(place.partition(",")[2])) if isinstance(place, str) else place
        with Image.open(data) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, binascii.Error) as error:
        raise QuantizeError(f"cannot open the image {str(place)[:80]} ({error}); mend or remove it") from None


def load_processor(folder: Path):
    """The model's own processor. Raises QuantizeError when its files are missing or damaged."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except Exception as error:  # whatever damaged files make of transformers
        reason = str(error).partition("\n")[0]
        raise QuantizeError(f"{folder} has no usable processor files ({reason}); copy the model again") from error


def model_inputs(chats: list[dict], processor, limit: int, max_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of at most `limit` chats that have at most `max_tokens` tokens, as the processor makes them.

    Raises QuantizeError for a chat that the processor refuses, and when no chat with an image is short enough.
    """
    found = pictured = 0
    for chat in chats:
        if found == limit:
            break
        _refuse_special_tokens(chat, processor.tokenizer.all_special_tokens)
        images = [open_image(place) for place in chat["images"]]
        try:
            text = processor.apply_chat_template(chat["messages"], tokenize=False)
            inputs = processor(text=[text], images=images or None, return_tensors="pt")
        except Exception as error:  # templates and processors raise what they like
            raise QuantizeError(f"{chat['line']}: the model's processor refuses it ({error!r:.200})") from error
        if inputs["input_ids"].shape[1] <= max_tokens:
            found, pictured = found + 1, pictured + bool(images)
            yield dict(inputs)
    if not pictured:
        raise QuantizeError(
            f"no sample with an image has at most {max_tokens} tokens; raise --max-tokens or use smaller pictures"
        )


def _refuse_special_tokens(chat: dict, special: list[str]) -> None:
    """A place holder in a text would stand for a picture that is not there."""
    for part in (part for message in chat["messages"] for part in message["content"]):
        for token in special:
            if token in part.get("text", ""):
                raise QuantizeError(f"{chat['line']}: the text {part['text'][:80]!r} holds {token}; remove it")
