"""Reads calibration data from a Hugging Face data set: `hf:NAME[/CONFIG][@SPLIT]`, through the optional `datasets`
package.

NAME is owner/name on the hub, or a folder on this machine where it begins with `/`, `.` or `~`. SPLIT is "train" unless
given; `@train[:2000]` takes the first 2000 rows. Columns are found by their names:

    messages or conversations, with or without images or image      chats, as in a JSONL file
    image, optional question, and answer, caption or text           a question about a picture, or a caption

Texts are read at once, pictures only when they are opened. Videos in data sets are not read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.chats import described, explaining, to_chat

if TYPE_CHECKING:
    import datasets
    import pyarrow

PREFIX = "hf:"
SHAPES = (
    "shapes that are understood: messages|conversations [+ images|image], or image [+ question] + answer|caption|text"
)
BATCH = 512  # rows that are read at once


@dataclass(frozen=True)
class Stored:
    """A picture in a row of a data set: its file's bytes when it is called."""

    label: str
    read: Callable[[], object]

    def __call__(self) -> bytes:
        value = self.read()
        if isinstance(value, dict):
            value = value.get("bytes") or Path(value["path"]).read_bytes()
        if not isinstance(value, bytes):
            raise QuantizeError(f"{self.label} holds a {type(value).__name__} where a picture's bytes should be")
        return value

    def __str__(self) -> str:
        return self.label


def read_hub(source: str) -> list[dict]:
    """The chats of a data set in its order. Raises QuantizeError where it cannot be had or has other columns."""
    name, config, split = parse(source)
    dataset = _load(source, name, config, split)
    texts, pictures = columns(source, dataset.column_names)
    chats = []
    for number, entry in enumerate(_entries(source, dataset, texts, pictures)):
        line = f"{source} row {number}"
        with explaining(line, "is no chat", SHAPES):
            chats.append(to_chat(_as_chat(entry), line, _locator(line)))
    return chats


def parse(source: str) -> tuple[str, str | None, str]:
    """(name, config, split) of `hf:NAME[/CONFIG][@SPLIT]`. Raises QuantizeError."""
    name, at, split = source.removeprefix(PREFIX).rpartition("@")
    if not at or "/" in split:
        name, split = source.removeprefix(PREFIX), "train"
    if name.startswith((".", "/", "~")):
        return str(Path(name).expanduser()), None, split
    parts = name.split("/")
    if not all(parts) or len(parts) > 3 or not split:
        raise QuantizeError(f"{source} names no data set; write hf:OWNER/NAME[/CONFIG][@SPLIT] or hf:/FOLDER[@SPLIT]")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split


def columns(source: str, names: list[str]) -> tuple[list[str], str | None]:
    """(columns with text, column with pictures) among a data set's columns. Raises QuantizeError for other shapes."""
    pictures = next((name for name in ("images", "image") if name in names), None)
    if chat := next((name for name in ("messages", "conversations") if name in names), None):
        return [chat, *(["task"] if "task" in names else [])], pictures
    answer = next((name for name in ("answer", "caption", "text") if name in names), None)
    if "image" not in names or answer is None:
        raise QuantizeError(f"{source} has the columns {', '.join(names)}; {SHAPES}")
    return [name for name in ("question", answer, "task") if name in names], "image"


def _load(source: str, name: str, config: str | None, split: str) -> "datasets.Dataset":
    try:
        import datasets
    except ImportError:
        raise QuantizeError(f"{source} needs the datasets package; pip install 'vlmq-vllm[data]'") from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub, the network and broken files make of it
        reason = " ".join(str(error).split())
        raise QuantizeError(
            f"cannot load the data set {source} ({reason:.300}); check name, config and split"
        ) from error


def _entries(source: str, dataset: "datasets.Dataset", texts: list[str], pictures: str | None) -> Iterator[dict]:
    """One dict per row: its texts, and its pictures as Stored; Arrow tables spare decoding and copying pictures."""
    rows = dataset.select_columns([pictures]).with_format("arrow") if pictures else None
    number = 0
    for table in dataset.select_columns([*texts, *([pictures] if pictures else [])]).with_format("arrow").iter(BATCH):
        for i in range(table.num_rows):
            entry = {name: table.column(name)[i].as_py() for name in texts}
            if pictures:
                entry["images"] = _stored(table.column(pictures)[i], f"{source} row {number}", rows, number)
            yield entry
            number += 1


def _stored(value: "pyarrow.Scalar", line: str, rows: "datasets.Dataset", number: int) -> list:
    """The pictures of one row's cell: a picture, a list of pictures, or nothing."""
    import pyarrow

    def cell(picture: int | None = None) -> object:
        found = rows[number].column(0)[0].as_py()
        return found if picture is None else found[picture]

    if not value.is_valid:
        return []
    if isinstance(value, pyarrow.ListScalar):
        return [Stored(f"{line}, picture {i}", partial(cell, i)) for i in range(len(value))]
    if isinstance(value, (pyarrow.StringScalar, pyarrow.LargeStringScalar)):
        return [value.as_py()]
    return [Stored(f"{line}, picture", cell)]


def _as_chat(entry: dict) -> dict:
    if "messages" in entry or "conversations" in entry:
        return entry
    image = entry["images"][0] if entry["images"] else None
    question = entry.get("question")
    if image is None and question is None:
        raise ValueError("neither a picture nor a question")
    answer = next(entry[name] for name in ("answer", "caption", "text") if name in entry)
    return described(image, answer, question) | {"task": entry.get("task")}


def _locator(line: str) -> Callable[[object, str], object]:
    def locate(place: object, kind: str) -> object:
        in_row = place.startswith("data:") if isinstance(place, str) else isinstance(place, Stored)
        if kind == "image" and in_row:
            return place
        if kind == "image" and isinstance(place, dict):
            return Stored(line, lambda: place)
        raise QuantizeError(
            f"{line} holds the {kind} {str(place)[:80]!r}; the data set itself must hold its pictures, and videos are "
            "not read: write its rows to a JSONL file beside the files"
        )

    return locate
