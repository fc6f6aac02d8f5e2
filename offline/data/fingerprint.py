"""Takes fingerprints of chats and pictures by content, to find the same sample twice or in two data sets.

A picture's fingerprint covers its RGB pixels before any resizing, a chat's its roles and texts with its pictures in
place. File names, paths, `data:` URLs, lossless formats and the spelling of JSON make no difference. A video given as
frames counts by its frames, a video file by its bytes: nothing is decoded for it.
"""

import hashlib
import json
from dataclasses import dataclass

from vlmq_vllm.offline.data.pictures import PicturePlace, open_image


@dataclass(frozen=True)
class Marks:
    """Fingerprints of a chat from `line`, of its pictures and then of its videos' frames or files in order. sizes:
    (width, height) of its pictures and frames."""

    line: str
    chat: str
    pictures: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]


def fingerprint(chat: dict) -> str:
    """SHA-256 in hex of a chat's content. Raises QuantizeError for a picture that cannot be opened."""
    return marks(chat).chat


def marks(chat: dict) -> Marks:
    """All fingerprints of a chat; every picture is opened once. Raises QuantizeError."""
    sizes: list[tuple[int, int]] = []
    images = [_picture(place, sizes) for place in chat["images"]]
    videos = [
        [_picture(frame, sizes) for frame in place]
        if isinstance(place, list)
        else hashlib.sha256(place.read_bytes()).hexdigest()
        for place in chat["videos"]
    ]
    left = {"image": iter(images), "video": iter(videos)}
    turns = [[message["role"], _content(message["content"], left)] for message in chat["messages"]]
    digest = hashlib.sha256(json.dumps(turns).encode()).hexdigest()
    flat = [mark for video in videos for mark in (video if isinstance(video, list) else [video])]
    return Marks(chat["line"], digest, (*images, *flat), tuple(sizes))


def shared(calibration: list[Marks], evaluation: list[Marks]) -> tuple[list[str], list[str]]:
    """Lines of calibration chats that are also in `evaluation`, and of those that share a picture with it."""
    chats = {mark.chat for mark in evaluation}
    pictures = {picture for mark in evaluation for picture in mark.pictures}
    return (
        [mark.line for mark in calibration if mark.chat in chats],
        [mark.line for mark in calibration if not pictures.isdisjoint(mark.pictures)],
    )


def _content(parts: list[dict], left: dict) -> list:
    """Texts and fingerprints in order; neighbouring texts are one, however they were cut."""
    content: list = []
    for part in parts:
        if part["type"] != "text":
            content.append([part["type"], next(left[part["type"]])])
        elif content and content[-1][0] == "text":
            content[-1][1] += part["text"]
        else:
            content.append(["text", part["text"]])
    return content


def _picture(place: PicturePlace, sizes: list[tuple[int, int]]) -> str:
    image = open_image(place)
    sizes.append(image.size)
    return hashlib.sha256(b"%d %d " % image.size + image.tobytes()).hexdigest()
