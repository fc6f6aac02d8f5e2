"""Reads chats from a JSONL file, a folder of pictures, or a Hugging Face data set."""

import random
from pathlib import Path

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.files import read_folder, read_jsonl
from vlmq_vllm.offline.data.hub import PREFIX, read_hub


def read_chats(source: str | Path, seed: int) -> list[dict]:
    """All chats of `source` as `to_chat` makes them, in an order that `seed` decides. Raises QuantizeError, also where
    none has a picture or video. source: a JSONL file or a folder (`files.py`), or `hf:NAME[/CONFIG][@SPLIT]`."""
    chats = read_all(source)
    if not any(chat["images"] or chat["videos"] for chat in chats):
        raise QuantizeError(
            f"none of the {len(chats)} samples in {source} has an image or a video; a vision-language model must be "
            'calibrated with images: add {"type": "image", "image": "FILE"} to the content of user messages'
        )
    random.Random(seed).shuffle(chats)
    return chats


def check_exists(source: str | Path) -> None:
    """Raises QuantizeError where `source` names a file or folder that is not there; a data set is not asked for."""
    if not str(source).startswith(PREFIX) and not Path(source).exists():
        raise QuantizeError(
            f"cannot read calibration data {source}: it does not exist; give a JSONL file of chats, a folder of "
            f"pictures or {PREFIX}NAME"
        )


def read_all(source: str | Path) -> list[dict]:
    """All chats of `source` in its own order, with or without pictures. Raises QuantizeError."""
    if str(source).startswith(PREFIX):
        return read_hub(str(source))
    path = Path(source)
    return read_folder(path) if path.is_dir() else read_jsonl(path)
