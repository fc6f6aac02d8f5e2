"""Makes a chat, in the shape that chat templates take, of one line, caption or row of data.

An entry is `{"messages": [{"role": ..., "content": ...}]}` in the shape of OpenAI and Hugging Face, or
`{"conversations": [{"from": "human", "value": ...}]}` in that of LLaVA. `content` is a string or a list of parts:

    {"type": "text", "text": ...}
    {"type": "image", "image": PLACE}  or  {"type": "image_url", "image_url": {"url": PLACE}}
    {"type": "video", "video": FILE or [frames' places]}

A bare `{"type": "image"}` takes the next of the entry's own "images" (or its one "image"), a bare video the next of its
"videos". Where such lists are given, `<image>` and `<video>` in a string stand for bare parts; with no part at all the
pictures go in front of the first user message.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vlmq_vllm.errors import QuantizeError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DESCRIBE = "Describe the image."

BROKEN = (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError)  # what a bad entry raises


def to_chat(entry: dict, line: str, locate: Callable[[object, str], object]) -> dict:
    """{"messages", "images", "videos", "line"} and, if the entry has one, "task"; raises one of BROKEN for a bad entry.

    Pictures and videos are bare parts; "images" and "videos" hold their places in order as `locate(place, kind)`
    returns them, frames of a video as images. `line` says where the entry comes from.
    """
    given = {kind: _given(entry, kind) for kind in ("image", "video")}
    found: dict[str, list] = {"image": [], "video": []}
    listed = [kind for kind in given if given[kind]]
    turns = entry["conversations" if "conversations" in entry else "messages"]
    messages = [_message(turn, listed, given, found) for turn in turns]
    for kind in listed:
        if given[kind] and found[kind]:
            raise ValueError(f"{len(given[kind])} more {kind}s are listed than its messages use")
        _lead(messages, kind, given[kind])
        found[kind] += given[kind]
    chat = {
        "messages": messages,
        "images": [locate(place, "image") for place in found["image"]],
        "videos": [_video(place, locate) for place in found["video"]],
        "line": line,
    }
    return chat | ({"task": str(entry["task"])} if entry.get("task") is not None else {})


@contextmanager
def explaining(line: str, complaint: str, expected: str) -> Iterator[None]:
    """Make one of BROKEN a QuantizeError."""
    try:
        yield
    except QuantizeError:
        raise
    except BROKEN as error:
        raise QuantizeError(f"{line} {complaint} ({type(error).__name__}: {error}); {expected}") from None


def described(image: object, answer: object, question: object = None) -> dict:
    """The entry of a picture with a caption or an answer; of several captions (a list of strings) the first is used."""
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("its caption or answer is empty or no text")
    asked: list[dict] = [] if image is None else [{"type": "image", "image": image}]
    asked.append({"type": "text", "text": DESCRIBE if question is None else question})
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _given(entry: dict, kind: str) -> list:
    if (many := entry.get(f"{kind}s")) is not None:
        return [many] if isinstance(many, str) else list(many)
    return [entry[kind]] if entry.get(kind) is not None else []


def _message(turn: dict, listed: list[str], given: dict, found: dict) -> dict:
    role, content = (ROLES[turn["from"]], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
    if not isinstance(role, str):
        raise TypeError(f"the role {role!r} is no text")
    parts = _split(content, listed) if isinstance(content, str) else content
    return {"role": role, "content": [_part(part, given, found) for part in parts]}


def _split(text: str, listed: list[str]) -> list[dict]:
    """The string as parts: placeholders of the kinds that are listed stand for bare parts."""
    pieces = re.split(f"<({'|'.join(listed)})>", text) if listed else [text]  # text, kind, text, kind, ..., text
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts = [{"type": p} if i % 2 else {"type": "text", "text": p.strip("\n")} for i, p in enumerate(pieces)]
    return [part for part in parts if part != {"type": "text", "text": ""}]


def _part(part: dict, given: dict, found: dict) -> dict:
    """The part as chat templates expect it; the place of a picture or video goes to `found`."""
    kind = "image" if part["type"] == "image_url" else part["type"]
    if kind == "text":
        if not isinstance(part["text"], str):
            raise TypeError(f"the text {part['text']!r:.80} is no string")
        return {"type": "text", "text": part["text"]}
    if kind not in found:
        raise KeyError(f"unknown part type {kind!r}")
    place = part.get(part["type"]) or part.get(kind)
    if not place:
        if not given[kind]:
            raise IndexError(f"fewer {kind}s are given than its messages use")
        place = given[kind].pop(0)
    found[kind].append(place["url"] if isinstance(place, dict) and "url" in place else place)
    return {"type": kind}


def _lead(messages: list[dict], kind: str, places: list) -> None:
    """Pictures that no part asks for stand in front of the first question."""
    if places:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{kind}s are listed but there is no user message")
        first["content"][:0] = [{"type": kind} for _ in places]


def _video(place: object, locate: Callable[[object, str], object]) -> object:
    if isinstance(place, list):
        if not place:
            raise ValueError("a video has no frames")
        return [locate(frame, "image") for frame in place]
    return locate(place, "video")
