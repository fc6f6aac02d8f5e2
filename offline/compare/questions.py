"""Reads chats as questions: finds which tokens are the reference answer, and what the model reads before them.

The answer is the last assistant message. Its tokens are found with the chat template alone: the chat up to the answer,
with the generation prompt, must be the beginning of the chat with the answer, in text and in tokens; what follows is
the answer, up to and including the first end-of-turn mark. What a template writes after that mark (a line break) is
never generated and does not count. Pictures are opened only when a question's inputs are made, one question at a time.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.inputs import prepare, render, tokenizing
from vlmq_vllm.offline.data.processor import Processor
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.settings.compare import CompareSettings


@dataclass(frozen=True)
class Question:
    """One chat that ends in its reference answer.

    chat: the chat up to the answer. words: token ids before the answer, every picture still one placeholder.
    answer: token ids of the answer, end mark included. trailing: number of tokens that the template adds after it.
    """

    chat: dict
    words: list[int]
    answer: list[int]
    trailing: int

    @property
    def pictured(self) -> bool:
        """Whether a picture or a video is in it."""
        return bool(self.chat["images"] or self.chat["videos"])

    @property
    def splits(self) -> list[str]:
        """Names of the parts of the data to which the question belongs, apart from "all"."""
        kind = "with picture" if self.pictured else "text only"
        return [kind] + ([f"task {self.chat['task']}"] if "task" in self.chat else [])

    def inputs(self, processor: Processor) -> tuple[dict[str, torch.Tensor], int]:
        """The processor's inputs of the whole chat (input_ids int64 [1, L]), and how many tokens precede the answer."""
        inputs, _ = prepare(self.chat, processor)
        ids = inputs["input_ids"][0].tolist()
        start = len(ids) - self.trailing - len(self.answer)
        if start < 1 or ids[start : len(ids) - self.trailing] != self.answer:
            raise QuantizeError(f"{self.chat['line']}: the processor's tokens do not end in the answer's; leave it out")
        return inputs, start


@dataclass(frozen=True)
class Exam:
    """What both models are asked; `ends` are the ids of end-of-turn marks."""

    questions: list[Question]
    processor: Processor
    ends: set[int]
    settings: CompareSettings

    def inputs(
        self, teacher: Sequence[object | None] | None, track: Callable, what: str
    ) -> Iterator[tuple[dict[str, torch.Tensor], int] | None]:
        """`Question.inputs` of every question; None for those left out: of more than `max_tokens` tokens, or without a
        score in `teacher`."""
        for question, known in zip(track(self.questions, what), teacher or repeat(True)):  # noqa: B905
            found = None if known is None else question.inputs(self.processor)
            yield None if found is None or found[0]["input_ids"].shape[1] > self.settings.max_tokens else found


def draw(data: str | Path, kind: str, samples: int | None, seed: int) -> list[dict]:
    """All chats of `data`, or as many as `samples` says. Raises QuantizeError where there are none of this kind."""
    chats = read_all(data)
    if not chats:
        raise QuantizeError(f"{data} holds no chat; give {kind} data with one chat per line")
    return chats if samples is None or samples >= len(chats) else random.Random(seed).sample(chats, samples)


def read_question(chat: dict, processor: Processor, ends: set[int]) -> Question:
    """The question of a chat; `ends` are the ids of end-of-turn marks. Raises QuantizeError, naming the chat's line."""
    chat = _cut(chat)
    try:
        whole = render(chat["messages"], processor)
        asked = processor.apply_chat_template(chat["messages"][:-1], tokenize=False, add_generation_prompt=True)
        ids, words = (processor.tokenizer(text, **tokenizing(text, processor))["input_ids"] for text in (whole, asked))
    except Exception as error:  # templates raise what they like
        raise QuantizeError(f"{chat['line']}: the model's chat template refuses it ({error!r:.200})") from error
    if not whole.startswith(asked) or ids[: len(words)] != words:
        raise QuantizeError(
            f"{chat['line']}: the model's chat template does not begin the answered chat with the prompt, "
            "so the answer's tokens cannot be told from the prompt's; compare on data without such chats"
        )
    tail = ids[len(words) :]
    end = next((i + 1 for i, token in enumerate(tail) if token in ends), len(tail))
    if processor.tokenizer.decode(tail[end:], skip_special_tokens=False).strip():
        raise QuantizeError(f"{chat['line']}: the answer goes on after an end-of-turn mark; remove the mark")
    return Question(chat, words, tail[:end], len(tail) - end)


def _cut(chat: dict) -> dict:
    """The chat up to its last assistant message, with the pictures and videos of that part."""
    answers = [i for i, message in enumerate(chat["messages"]) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise QuantizeError(
            f"{chat['line']} has no question with an assistant message after it; every chat needs a reference answer: "
            'add {"role": "assistant", "content": ANSWER}'
        )
    messages = chat["messages"][: answers[-1] + 1]
    if not any(part.get("text", "").strip() for part in messages[-1]["content"]):
        raise QuantizeError(f"{chat['line']}: its reference answer is empty; write one or remove the line")
    kinds = [part["type"] for message in messages for part in message["content"]]
    images, videos = chat["images"][: kinds.count("image")], chat["videos"][: kinds.count("video")]
    return {**chat, "messages": messages, "images": images, "videos": videos}


def end_ids(folder: Path, processor: Processor) -> set[int]:
    """Ids at which the model ends a turn: of its generation_config.json, config.json and tokenizer."""
    found = [processor.tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            for part in (content, content.get("text_config") or {}):
                ids = part.get("eos_token_id")
                found += ids if isinstance(ids, list) else [ids]
    return {token for token in found if token is not None}
