"""Reads calibration data from a folder of pictures with captions.

Either the folder has a `metadata.jsonl` as Hugging Face's imagefolder does, with lines `{"file_name": ..., "text" or
"caption": ..., "question": ... (optional)}`, or every picture NAME.jpg (.jpeg, .png, .webp; also in subfolders) has its
caption beside it in NAME.txt. The chat is the question, or "Describe the image.", and the caption as its answer.
"""

from pathlib import Path

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.chats import BROKEN, described, to_chat
from vlmq_vllm.offline.data.jsonl import json_lines, local

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def read_folder(folder: Path) -> list[dict]:
    """The chats of a folder, by file name or in the order of metadata.jsonl. Raises QuantizeError."""
    metadata = folder / "metadata.jsonl"
    return _by_metadata(metadata) if metadata.is_file() else _by_name(folder)


def _by_metadata(path: Path) -> list[dict]:
    chats = []
    for line, entry in json_lines(path):
        try:
            caption = entry["text"] if "text" in entry else entry["caption"]
            entry = described(entry["file_name"], caption, entry.get("question"))
            chats.append(to_chat(entry, line, local(path.parent, line)))
        except QuantizeError:
            raise
        except BROKEN as error:
            raise QuantizeError(
                f"{line} describes no picture ({type(error).__name__}: {error}); "
                'expected {"file_name": ..., "text" or "caption": ..., optional "question": ...}'
            ) from None
    return chats


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
        chats.append(to_chat(entry, str(picture), local(picture.parent, str(picture))))
    return chats
