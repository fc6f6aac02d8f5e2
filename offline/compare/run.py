"""Runs a comparison from folders to report: the 16-bit model first, the quantised one second, never both in memory."""

import json
from collections.abc import Callable
from pathlib import Path

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.headers import read_config, read_headers
from vlmq_vllm.offline.checkpoint.writer import REPORT
from vlmq_vllm.offline.compare import engine, hf
from vlmq_vllm.offline.compare.bootstrap import DRAWS, LEVEL
from vlmq_vllm.offline.compare.cache import Cache, key_of
from vlmq_vllm.offline.compare.questions import Exam, draw, end_ids, read_question
from vlmq_vllm.offline.compare.report import sample_row, split_rows
from vlmq_vllm.offline.compare.scores import Score
from vlmq_vllm.offline.compare.weights import is_vlmq
from vlmq_vllm.offline.data.fingerprint import fingerprint
from vlmq_vllm.offline.data.inputs import load_processor
from vlmq_vllm.offline.data.processor import Processor
from vlmq_vllm.offline.machine.device import default_device
from vlmq_vllm.offline.machine.progress import Progress
from vlmq_vllm.offline.model.source import find
from vlmq_vllm.offline.settings.compare import CompareSettings

SCORERS = {"hf": hf.score, "vllm": engine.score}


def compare(
    model: str,
    quantized: Path,
    data: str | Path,
    settings: CompareSettings,
    cache: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """The report on `quantized` beside its 16-bit original `model`, ready for JSON.

    `say` is given lines for the user: where cached scores come from, and overlap with the calibration data.
    Raises QuantizeError for what cannot be compared and CheckpointError for broken folders.
    """
    track = (progress or Progress()).track
    folder = find(model)
    processor = _check_pair(folder, quantized)
    ends = end_ids(folder, processor)
    chats = draw(data, "evaluation", settings.samples, settings.seed)
    questions = [read_question(chat, processor, ends) for chat in chats]
    prints = [fingerprint(chat) for chat in chats]
    overlap = _overlap(quantized, prints, say)
    exam = Exam(questions, processor, ends, settings)
    teacher, cached = _teacher(folder, prints, exam, Cache(cache, say) if cache else None, track)
    if not any(teacher):
        raise QuantizeError(f"no chat in {data} has at most {settings.max_tokens} tokens; raise --max-tokens")
    student = SCORERS[settings.backend](quantized, exam, teacher, track)
    pairs = zip(questions, teacher, student, strict=True)
    rows = [sample_row(question, first, second) for question, first, second in pairs if first and second]
    assert len(rows) == sum(map(bool, teacher)), "a question that the teacher was asked is asked the student"
    return {
        "model": model,
        "quantized": str(quantized),
        "data": str(data),
        "backend": settings.backend,
        "dtype": settings.dtype,
        "samples": len(rows),
        "left_out": {"longer than max_tokens": len(questions) - len(rows), "max_tokens": settings.max_tokens},
        "kl": _outcomes(next(filter(None, teacher))),
        "max_new_tokens": settings.max_new_tokens,
        "bootstrap": {"level": LEVEL, "draws": DRAWS, "seed": settings.seed, "over": "samples"},
        "teacher_from_cache": cached,
        "calibration_overlap": overlap,
        "splits": split_rows(rows, settings.seed),
        "rows": rows,
    }


def _check_pair(folder: Path, quantized: Path) -> Processor:
    """The processor of the 16-bit model, after checking that both models read and write the same tokens."""
    if is_vlmq(folder):
        raise QuantizeError(f"{folder} is itself quantised by vlmq; give the 16-bit original first, then {quantized}")
    sizes = [_vocabulary(read_config(each)) for each in (folder, quantized)]
    for each in (folder, quantized):
        read_headers(each)  # refuses damaged files before anything is run
    if sizes[0] != sizes[1]:
        raise QuantizeError(
            f"{folder} has a vocabulary of {sizes[0]}, {quantized} one of {sizes[1]}; compare models of one origin"
        )
    processor, other = load_processor(folder), load_processor(quantized)
    if processor.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise QuantizeError(f"{folder} and {quantized} have different tokenizers; compare models of one origin")
    if _template(processor) != _template(other):
        raise QuantizeError(f"{folder} and {quantized} have different chat templates; copy the template of one to both")
    return processor


def _vocabulary(config: dict) -> int | None:
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def _template(processor: Processor) -> object:
    return getattr(processor, "chat_template", None) or processor.tokenizer.chat_template


def _teacher(
    folder: Path, prints: list[str], exam: Exam, cache: Cache | None, track: Callable
) -> tuple[list[Score | None], bool]:
    """The 16-bit model's scores, and whether they come from the cache."""
    settings, scorer = exam.settings, SCORERS[exam.settings.backend]
    if cache is None:
        return scorer(folder, exam, None, track), False
    device = default_device(settings.device) if settings.backend == "hf" else "vllm"
    key = key_of(folder, prints, exam.ends, settings, device)
    scores: list[Score | None] | None = cache.read(key, len(prints))
    if scores is not None:
        return scores, True
    scores = scorer(folder, exam, None, track)
    if any(scores):
        cache.write(key, scores)
    return scores, False


def _outcomes(score: Score) -> dict:
    return {"top": score.ids.shape[1], "exact": bool((score.rest == float("-inf")).all())}


def _overlap(quantized: Path, prints: list[str], say: Callable[[str], None]) -> int | None:
    """How many chats were also calibrated with; None when the checkpoint does not tell."""
    path = quantized / REPORT
    try:
        known = set(json.loads(path.read_text(encoding="utf-8"))["calibration"]["fingerprints"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shared = sum(mark in known for mark in prints)
    if shared:
        say(
            f"warning: {shared} of {len(prints)} evaluation chats are calibration chats of {quantized}; "
            "it looks better on them than on others"
        )
    return shared
