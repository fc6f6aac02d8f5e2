"""What the tokens of a sample are: vision placeholders, user's text, the assistant's answer, and the rest.

Vision placeholders are counted by the ids that config.json gives. To tell the texts from what the chat template writes
around them, the template is run once more with marks in their place.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.inputs import render, tokenizing

KINDS = ("vision", "user", "answer", "special")
VISION_IDS = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))  # new name, old name


def vision_ids(config: dict) -> set[int]:
    """Ids of the tokens that stand for vision features. Raises QuantizeError where config.json names none."""
    named = [next((config[name] for name in names if config.get(name) is not None), None) for names in VISION_IDS]
    ids = {number for number in named if number is not None}
    if not ids:
        raise QuantizeError(
            "config.json has neither image_token_id nor video_token_id; vision tokens of this model cannot be counted, "
            "inspect the data without --model"
        )
    return ids


def count_kinds(chat: dict, ids: list[int], processor, vision: set[int]) -> dict[str, int | None]:
    """Tokens of each of KINDS in a sample with the input ids `ids`; they add up to len(ids).

    "user" are texts of user and system messages, "answer" those of the assistant, "special" what the template and the
    processor write around them. All but "vision" are None where the template rewrites the texts.
    """
    seen = sum(number in vision for number in ids)
    spans = _spans(chat, processor)
    if spans is None:
        return {"vision": seen, "user": None, "answer": None, "special": None}
    text, starts, ends, roles = spans
    encoded = processor.tokenizer(text, return_offsets_mapping=True, **tokenizing(text, processor))
    counts = {"user": 0, "answer": 0}
    for begin, end in encoded["offset_mapping"]:
        i = bisect_right(starts, begin) - 1  # a token belongs to the text that it begins in
        if end > begin and i >= 0 and begin < ends[i]:
            counts["answer" if roles[i] == "assistant" else "user"] += 1
    return {"vision": seen, **counts, "special": len(ids) - seen - sum(counts.values())}


def _spans(chat: dict, processor) -> tuple[str, list[int], list[int], list[str]] | None:
    """The rendered chat, and where its texts begin and end in it and whose they are; None where they are not in it."""
    if not processor.tokenizer.is_fast:
        return None
    texts = [(message["role"], part) for message in chat["messages"] for part in message["content"] if "text" in part]
    numbers = iter(range(len(texts)))
    marked = [
        message | {"content": [_mark(part, numbers) for part in message["content"]]} for message in chat["messages"]
    ]
    pieces = re.split("\ue000(\\d+)\ue001", render(marked, processor))  # template, number, template, ..., template
    rendered = render(chat["messages"], processor)
    for clean in (str, str.strip):  # some templates strip what they are given
        filled = _fill(pieces, [(role, clean(part["text"])) for role, part in texts])
        if filled[0] == rendered:
            return filled
    return None


def _mark(part: dict, numbers: Iterator[int]) -> dict:
    return {"type": "text", "text": f"\ue000{next(numbers)}\ue001"} if "text" in part else part


def _fill(pieces: list[str], texts: list[tuple[str, str]]) -> tuple[str, list[int], list[int], list[str]]:
    """The texts in place of their marks, with their beginnings, ends and roles."""
    text, starts, ends, roles = pieces[0], [], [], []
    for number, literal in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        role, inner = texts[number]
        starts.append(len(text))
        ends.append(len(text) + len(inner))
        roles.append(role)
        text += inner + literal
    return text, starts, ends, roles
