"""Tells what each token of a sample is: vision placeholder, user's text, the assistant's answer, or other.

To tell the texts from what the chat template writes around them, the template is run once more with marks in their
place.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.inputs import render, tokenizing
from vlmq_vllm.offline.data.processor import Processor

KINDS = ("vision", "user", "answer", "special")
IGNORED = -100  # label of a token that is not to be predicted
OTHER, VISION, ANSWER = range(3)  # what a token is to a method that tells them apart
UNKNOWN = "which tokens are its answer's cannot be told"
UNKNOWN_ADVICE = "leave it out, or choose a saliency that needs no answers"
VISION_IDS = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))  # new name, old name


def vision_ids(config: dict) -> set[int]:
    """Ids of the tokens that stand for vision features. Raises QuantizeError where config.json names none."""
    named = [next((config[name] for name in names if config.get(name) is not None), None) for names in VISION_IDS]
    ids = {number for number in named if number is not None}
    if not ids:
        raise QuantizeError(
            "config.json has neither image_token_id nor video_token_id; vision tokens of this model cannot be told "
            "from others: inspect the data without --model, quantise with a saliency that needs no kinds of tokens"
        )
    return ids


def count_kinds(chat: dict, ids: list[int], processor: Processor, vision: set[int]) -> dict[str, int | None]:
    """Tokens of each of KINDS in a sample with the input ids `ids`; they add up to len(ids).

    "user" are texts of user and system messages, "answer" those of the assistant, "special" what the template and the
    processor write around them. All but "vision" are None where the template rewrites the texts.
    """
    seen = sum(number in vision for number in ids)
    plain = _plain(chat, processor)
    if plain is None:
        return {"vision": seen, "user": None, "answer": None, "special": None}
    texts = Counter(token.role == "assistant" for token in plain if token.role)
    return {"vision": seen, "user": texts[False], "answer": texts[True], "special": len(ids) - seen - texts.total()}


def token_kinds(chat: dict, ids: list[int], processor: Processor, vision: set[int]) -> torch.Tensor:
    """OTHER, VISION or ANSWER for each of a sample's input ids, int8 [T].

    Answers are the assistant's texts with the mark after them that ends a turn: a model is trained to write it. Raises
    QuantizeError where answers cannot be found again among `ids`.
    """
    plain = _plain(chat, processor)
    if plain is None:
        raise QuantizeError(f"{chat['line']}: {UNKNOWN} (the chat template rewrites texts); {UNKNOWN_ADVICE}")
    kinds = torch.tensor([VISION if number in vision else OTHER for number in ids], dtype=torch.int8)
    # What a processor writes for a picture is many vision tokens and few others; those it does not write are the same.
    places = [i for i, number in enumerate(ids) if number not in vision]
    tokens = [token for token in plain if token.id not in vision]
    same = SequenceMatcher(None, [t.id for t in tokens], [ids[i] for i in places], autojunk=False)
    for begin, other, size in same.get_matching_blocks():
        for token, place in zip(tokens[begin : begin + size], places[other : other + size], strict=True):
            if token.answer:
                kinds[place] = ANSWER
    if int((kinds == ANSWER).sum()) != sum(token.answer for token in tokens):
        raise QuantizeError(f"{chat['line']}: {UNKNOWN} (the processor writes them otherwise); {UNKNOWN_ADVICE}")
    return kinds


def answer_labels(ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Labels int64 [B, T]: the ids [B, T] of tokens of kind ANSWER, IGNORED elsewhere."""
    return torch.where(kinds == ANSWER, ids, IGNORED)


def count_labels(labels: Sequence[torch.Tensor]) -> int:
    """Tokens that are predicted; nothing comes before the first of a sample."""
    return sum(int((one[:, 1:] != IGNORED).sum()) for one in labels)


@dataclass(frozen=True)
class _Token:
    """A token of the chat without pictures. role: whose text it begins in. answer: whether it holds a part of an answer
    or is the mark after one."""

    id: int
    role: str | None
    answer: bool


def _plain(chat: dict, processor: Processor) -> list[_Token] | None:
    """The tokens of the rendered chat; None where its texts are not in it."""
    filled = _rendered(chat, processor)
    if filled is None:
        return None
    text, owners = filled
    encoded = processor.tokenizer(text, return_offsets_mapping=True, **tokenizing(text, processor))
    ends_turn = _turn_ends(processor.tokenizer, encoded["input_ids"])
    tokens = []
    open_turn = False  # nothing but white space has come after the last text of an assistant's message
    for number, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first, last = (owners[begin], owners[end - 1]) if end > begin else (None, None)
        inner = last if first is None else first
        is_end = open_turn and inner is None and number in ends_turn
        role = None if first is None else first.role
        tokens.append(_Token(number, role, is_end or (inner is not None and inner.role == "assistant")))
        if inner is not None:
            open_turn = inner.role == "assistant" and inner.last
        elif not text[begin:end].isspace():
            open_turn = False
    return tokens


def _turn_ends(tokenizer: Any, ids: list[int]) -> set[int]:
    """Ids that can end a turn: special tokens other than the chat's first, which opens one."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - set(ids[:1])


@dataclass(frozen=True)
class _Part:
    """A text of a chat. last: nothing comes after it in its message."""

    role: str
    text: str
    last: bool


def _rendered(chat: dict, processor: Processor) -> tuple[str, list[_Part | None]] | None:
    """The rendered chat, and the text that each of its characters belongs to; None where its texts are not in it."""
    if not processor.tokenizer.is_fast:
        return None
    texts = [
        _Part(message["role"], part["text"], number == len(message["content"]))
        for message in chat["messages"]
        for number, part in enumerate(message["content"], 1)
        if "text" in part
    ]
    numbers = iter(range(len(texts)))
    marked = [
        message | {"content": [_mark(part, numbers) for part in message["content"]]} for message in chat["messages"]
    ]
    pieces = re.split("\ue000(\\d+)\ue001", render(marked, processor))  # template, number, template, ..., template
    rendered = render(chat["messages"], processor)
    for clean in (str, str.strip):  # some templates strip what they are given
        filled = _fill(pieces, [replace(part, text=clean(part.text)) for part in texts])
        if filled[0] == rendered:
            return filled
    return None


def _mark(part: dict, numbers: Iterator[int]) -> dict:
    return {"type": "text", "text": f"\ue000{next(numbers)}\ue001"} if "text" in part else part


def _fill(pieces: list[str], texts: list[_Part]) -> tuple[str, list[_Part | None]]:
    """The texts in place of their marks, and by character the text that it belongs to; None: the template's own."""
    text = pieces[0]
    owners: list[_Part | None] = [None] * len(text)
    for number, literal in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        part = texts[number]
        text += part.text + literal
        owners += [part] * len(part.text) + [None] * len(literal)
    return text, owners
