"""Scores a model through transformers, one sample at a time and never padded.

Exact match of the likeliest tokens after the reference answer's own tokens equals exact match of the greedy answer: as
long as each likeliest token is the reference's, both read the same tokens.
"""

import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmq_vllm.offline.compare.questions import Exam
from vlmq_vllm.offline.compare.scores import Score
from vlmq_vllm.offline.compare.weights import load_model
from vlmq_vllm.offline.machine.device import default_device
from vlmq_vllm.offline.settings.compare import CompareSettings


def score(folder: Path, exam: Exam, teacher: list[Score | None] | None, track: Callable) -> list[Score | None]:
    """A score for every question, None for those left out: longer than max_tokens, or without a teacher's score.

    The model is loaded for the call and freed after it. Without `teacher` the model is the teacher itself.
    Raises QuantizeError and CheckpointError.
    """
    model = load_model(folder, getattr(torch, exam.settings.dtype), default_device(exam.settings.device))
    scores: list[Score | None] = []
    try:
        given = exam.inputs(teacher, track, folder.name)
        for found, question, known in zip(given, exam.questions, teacher or [None] * len(exam.questions), strict=True):
            one = found and score_one(model, *found, question.answer, exam.ends, exam.settings, known)
            scores.append(one and one.check(str(folder), question.chat["line"]))
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return scores


@torch.inference_mode()
def score_one(
    model: Any,
    inputs: dict[str, torch.Tensor],
    start: int,
    answer: list[int],
    ends: set[int],
    settings: CompareSettings,
    teacher: Score | None,
) -> Score:
    """The score of one sample: a processor's `inputs`, with the answer's tokens from `start` on. Without `teacher`, of
    whose tokens the probabilities are taken, of the model's own likeliest. `model` is of transformers."""
    inputs = {name: v.to(model.device, model.dtype if v.is_floating_point() else None) for name, v in inputs.items()}
    logs = answer_logs(model, inputs, start, len(answer))
    if teacher is None:
        chosen = logs.topk(min(settings.top, logs.shape[-1])).indices
    else:
        chosen = torch.from_numpy(teacher.ids.astype(np.int64)).to(logs.device)
    right = torch.tensor(answer, device=logs.device)
    return Score(
        answer=np.array(answer),
        ids=chosen.cpu().numpy(),
        logs=logs.gather(1, chosen).cpu().numpy(),
        rest=logs.scatter(1, chosen, -torch.inf).logsumexp(1).cpu().numpy(),
        own=logs.gather(1, right[:, None])[:, 0].cpu().numpy(),
        best=logs.argmax(1).cpu().numpy(),
        greedy=np.array(_generate(model, inputs, start, ends, settings.max_new_tokens)),
    )


def answer_logs(model: torch.nn.Module, inputs: dict[str, torch.Tensor], start: int, tokens: int) -> torch.Tensor:
    """Log-probabilities [tokens, V] float64 with which the model expects the tokens from `start` on."""
    left = inputs["input_ids"].shape[1] - start
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # spares [L, V] logits
        logits = model(**inputs, use_cache=False, logits_to_keep=left + 1).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[0, start - 1 :]
    return logits[:tokens].double().log_softmax(-1)


def _generate(model: Any, inputs: dict[str, torch.Tensor], start: int, ends: set[int], new_tokens: int) -> list[int]:
    """The greedy answer up to its end mark or to `new_tokens` tokens."""
    from transformers import GenerationConfig

    if not new_tokens:
        return []
    length = inputs["input_ids"].shape[1]
    asked = {name: v[:, :start] if v.shape[:2] == (1, length) else v for name, v in inputs.items()}
    # the model's own settings may sample or penalise repetition
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends)
    )
    return model.generate(**asked)[0, start:].tolist()
