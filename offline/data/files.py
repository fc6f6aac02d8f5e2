"""Reads calibration data from files: chats line by line, or pictures with captions.

A JSONL file has a chat per line (`chats.py`), pictures and videos as paths from the file on or `data:` URLs. A folder
has a `metadata.jsonl` as Hugging Face's imagefolder does, with lines `{"file_name": ..., "text" or "caption": ...,
"question": ... (optional)}`, or every picture NAME.jpg (.jpeg, .png, .webp; also in subfolders) has its caption beside
it in NAME.txt; its chat is the question, or "Describe the image.", and the caption as its answer. No picture is opened.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.chats import described, explaining, to_chat

NO_CHAT = "is no chat", 'expected {"messages": [...]}'
NO_PICTURE = "describes no picture", 'expected {"file_name": ..., "text" or "caption": ..., optional "question": ...}'
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def read_jsonl(path: Path) -> list[dict]:
    """The chats of a file in its order. Raises QuantizeError for a file or line that is not as it should be."""
    return _by_line(path, lambda entry: entry, *NO_CHAT)


def read_folder(folder: Path) -> list[dict]:
    """The chats of a folder, by file name or in the order of metadata.jsonl. Raises QuantizeError."""
    metadata = folder / "metadata.jsonl"
    return _by_line(metadata, _captioned, *NO_PICTURE) if metadata.is_file() else _by_name(folder)


def _by_line(path: Path, entry_of: Callable[[Any], dict], complaint: str, expected: str) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(
            f"cannot read calibration data {path} ({error}); give a JSONL file of chats, a folder of pictures with "
            "captions, or hf:NAME for a data set of the Hugging Face hub"
        ) from None
    chats = []
    for number, text in enumerate(lines, start=1):
        if text.strip():
            line = f"{path} line {number}"
            with explaining(line, *NO_CHAT):
                value = json.loads(text)
            with explaining(line, complaint, expected):
                chats.append(to_chat(entry_of(value), line, _local(path.parent, line)))
    return chats


def _captioned(entry: dict) -> dict:
    caption = entry["text"] if "text" in entry else entry["caption"]
    return described(entry["file_name"], caption, entry.get("question"))


def _by_name(folder: Path) -> list[dict]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not pictures:
        raise QuantizeError(
            f"{folder} has no metadata.jsonl and no pictures ({', '.join(PICTURES)}); give a folder of pictures with "
            "captions, or a JSONL file of chats"
        )
    chats = []
    for picture in pictures:
        caption = picture.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
            entry = described(picture.name, text)
        except FileNotFoundError:
            raise QuantizeError(
                f"{picture} has no caption; write it to {caption.name} beside it, or list all in a metadata.jsonl"
            ) from None
        except (OSError, ValueError) as error:
            raise QuantizeError(f"cannot use the caption {caption} ({error}); write it anew") from None
        chats.append(to_chat(entry, str(picture), _local(picture.parent, str(picture))))
    return chats


def _local(folder: Path, line: str) -> Callable[[object, str], str | Path]:
    """locate(place, kind) for entries whose paths start at `folder`; raises QuantizeError for what is not there."""

    def locate(place: object, kind: str) -> str | Path:
        if not isinstance(place, str):
            raise TypeError(f"the {kind} {place!r:.80} is no path")
        if place.startswith("data:") and kind == "image":
            return place
        if place.startswith("data:"):
            raise QuantizeError(f"{line} holds a video as data: URL; give a file, or a list of frames")
        if place.startswith(("http:", "https:")):
            what = "pictures" if kind == "image" else "videos"
            raise QuantizeError(f"{line} names {place[:80]}; {what} are not fetched, download it first")
        file = folder / place.removeprefix("file://")
        if not os.path.isfile(file):  # unlike Path.is_file, False for names that no file can have
            raise QuantizeError(f"{line} names the {kind} {place[:80]}, no such file; paths start at {folder}")
        return file

    return locate
