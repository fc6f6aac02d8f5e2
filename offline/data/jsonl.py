"""Reads calibration data from a JSONL file: a chat per line (`chats.py`), pictures and videos as paths from the file on
or `data:` URLs. Nothing is fetched from the network, and no picture is opened here."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.chats import explaining, to_chat

NO_CHAT = "is no chat", 'expected {"messages": [...]}'


def read_jsonl(path: Path) -> list[dict]:
    """The chats of a file in its order. Raises QuantizeError for a file or line that is not as it should be."""
    chats = []
    for line, entry in json_lines(path):
        with explaining(line, *NO_CHAT):
            chats.append(to_chat(entry, line, local(path.parent, line)))
    return chats


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it is, value) of every line that is not blank. Raises QuantizeError for a line that is no JSON."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(
            f"cannot read calibration data {path} ({error}); give a JSONL file of chats, a folder of pictures with "
            "captions, or hf:NAME for a data set of the Hugging Face hub"
        ) from None
    for number, text in enumerate(lines, start=1):
        if text.strip():
            line = f"{path} line {number}"
            with explaining(line, *NO_CHAT):
                entry = json.loads(text)
            yield line, entry


def local(folder: Path, line: str) -> Callable[[object, str], str | Path]:
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
