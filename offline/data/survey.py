"""Surveys a set of chats: pictures, duplicates, and tokens with the limits and the drawing of a quantisation run."""

from collections import Counter

import numpy as np

from vlmq_vllm.offline.data.fingerprint import Marks
from vlmq_vllm.offline.data.inputs import Intake, model_inputs
from vlmq_vllm.offline.data.processor import Processor
from vlmq_vllm.offline.data.token_kinds import KINDS, count_kinds

PERCENTILES = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}


def survey(chats: list[dict], marks: list[Marks]) -> dict:
    """Counts of samples, pictures and duplicates (lines of what an earlier chat has already); `marks` are the chats'.

    sizes: [width, height] of the smallest, the median and the largest picture or frame by pixels; None without any.
    """
    sizes = sorted((size for mark in marks for size in mark.sizes), key=lambda size: (size[0] * size[1], size))
    picked = {"min": 0, "median": (len(sizes) - 1) // 2, "max": -1}
    return {
        "samples": len(chats),
        "text_only": sum(not chat["images"] and not chat["videos"] for chat in chats),
        "pictures": sum(len(chat["images"]) for chat in chats),
        "videos": sum(len(chat["videos"]) for chat in chats),
        "sizes": {name: list(sizes[i]) for name, i in picked.items()} if sizes else None,
        "tasks": dict(sorted(Counter(chat["task"] for chat in chats if "task" in chat).items())),
        "duplicates": {
            "chats": _again([(mark.line, [mark.chat]) for mark in marks]),
            "pictures": _again([(mark.line, mark.pictures) for mark in marks]),
        },
    }


def survey_tokens(
    chats: list[dict], processor: Processor, vision: set[int], limit: int, max_tokens: int, max_pixels: int | None
) -> dict:
    """Tokens of the samples that a run with these limits would draw from `chats`.

    kinds: tokens of used samples by kind (`token_kinds.py`), None where the template hides it. lengths: percentiles of
    tokens per sample over all that were looked at, those too long among them.
    """
    intake = Intake()
    kinds: dict[str, int | None] = dict.fromkeys(KINDS, 0)
    for chat, inputs in model_inputs(chats, processor, limit, max_tokens, max_pixels, intake, pictured=False):
        for kind, count in count_kinds(chat, inputs["input_ids"][0].tolist(), processor, vision).items():
            before = kinds[kind]
            kinds[kind] = None if count is None or before is None else before + count
    occurring = np.percentile(intake.lengths, list(PERCENTILES.values()), method="inverted_cdf").tolist()
    return {
        "used": intake.used,
        "too_long": intake.too_long,
        "shrunk": intake.shrunk,
        "kinds": kinds,
        "lengths": {name: int(length) for name, length in zip(PERCENTILES, occurring, strict=True)},
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
