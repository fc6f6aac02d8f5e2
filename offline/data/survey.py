"""Surveys a set of chats: pictures, duplicates, tokens, and what it shares with another set, as plain values.

The same limits and the same drawing as in a quantisation run (`inputs.py`); nothing is written, no model is loaded.
"""

from collections import Counter

import numpy as np

from vlmq_vllm.offline.data.fingerprint import Marks, shared
from vlmq_vllm.offline.data.inputs import Intake, admitted
from vlmq_vllm.offline.data.token_kinds import KINDS, count_kinds

PERCENTILES = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}


def survey(chats: list[dict], marks: list[Marks]) -> dict:
    """Counts of samples, pictures and duplicates; `marks` are those of the chats, in the same order.

    sizes: [width, height] of the smallest, the median and the largest picture or frame by pixels; None without any.
    duplicates: lines of chats, and of chats with a picture, that an earlier chat has already.
    """
    sizes = sorted((size for mark in marks for size in mark.sizes), key=lambda size: (size[0] * size[1], size))
    return {
        "samples": len(chats),
        "text_only": sum(not chat["images"] and not chat["videos"] for chat in chats),
        "pictures": sum(len(chat["images"]) for chat in chats),
        "videos": sum(len(chat["videos"]) for chat in chats),
        "sizes": {
            "min": list(sizes[0]),
            "median": list(sizes[(len(sizes) - 1) // 2]),
            "max": list(sizes[-1]),
        }
        if sizes
        else None,
        "tasks": dict(sorted(Counter(chat["task"] for chat in chats if "task" in chat).items())),
        "duplicates": {
            "chats": _again([(mark.line, [mark.chat]) for mark in marks]),
            "pictures": _again([(mark.line, mark.pictures) for mark in marks]),
        },
    }


def survey_overlap(marks: list[Marks], against: list[Marks]) -> dict:
    """Lines of chats that are also in the other set, and of those that share a picture with it."""
    chats, pictures = shared(marks, against)
    return {"chats": chats, "pictures": pictures}


def survey_tokens(
    chats: list[dict], processor, vision: set[int], limit: int, max_tokens: int, max_pixels: int | None
) -> dict:
    """Tokens of the samples that a run with these limits would draw from `chats`.

    used, too_long, shrunk: as in Intake. kinds: tokens of used samples by kind (`token_kinds.py`), None where the
    template hides it. lengths: percentiles of tokens per sample over all that were looked at, those too long among
    them.
    """
    intake, kinds = Intake(), dict.fromkeys(KINDS, 0)
    for chat, inputs in admitted(chats, processor, limit, max_tokens, max_pixels, intake):
        for kind, count in count_kinds(chat, inputs["input_ids"][0].tolist(), processor, vision).items():
            kinds[kind] = None if count is None or kinds[kind] is None else kinds[kind] + count
    found = np.percentile(
        intake.lengths, list(PERCENTILES.values()), method="inverted_cdf"
    ).tolist()  # lengths that occur
    return {
        "used": intake.used,
        "too_long": intake.too_long,
        "shrunk": intake.shrunk,
        "kinds": kinds,
        "lengths": {name: int(length) for name, length in zip(PERCENTILES, found, strict=True)},
    }


def _again(found: list) -> list[str]:
    """Lines with a fingerprint that an earlier line has, for (line, its fingerprints)."""
    seen: set[str] = set()
    lines = []
    for line, marks in found:
        if not seen.isdisjoint(marks):
            lines.append(line)
        seen.update(marks)
    return lines
