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

    A chat is {"messages": [...], "images": [...]}: every image part is {"type": "image"}, and its picture is in order.
    """
    try:
        lines = path.read_text().splitlines()
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
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise QuantizeError(
            f'{path} line {number} is no chat ({type(error).__name__}: {error}); expected {{"messages": [...]}}'
        ) from None
    return {"messages": normal, "images": [_locate(path, number, image) for image in images]}


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
    file = path.parent / image.removeprefix("file://")
    if not file.is_file():
        raise QuantizeError(f"{path} line {number} names the image {image}, no such file; paths start at {path.parent}")
    return file


def open_image(place: str | Path):
    """The RGB picture at a path or in a data: URL."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = io.BytesIO(base64.b64decode(place.partition(",")[2])) if isinstance(place, str) else place
        with Image.open(data) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, binascii.Error) as error:
        raise QuantizeError(f"cannot open the image {str(place)[:80]} ({error}); mend or remove it") from None


def model_inputs(chats: list[dict], processor, limit: int, max_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of at most `limit` chats that have at most `max_tokens` tokens, as the processor makes them."""
    found = 0
    for chat in chats:
        if found == limit:
            return
        text = processor.apply_chat_template(chat["messages"], tokenize=False)
        images = [open_image(place) for place in chat["images"]]
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        if inputs["input_ids"].shape[1] <= max_tokens:
            found += 1
            yield dict(inputs)
    if not found:
        raise QuantizeError(f"all {len(chats)} samples are longer than {max_tokens} tokens; raise --max-tokens")
