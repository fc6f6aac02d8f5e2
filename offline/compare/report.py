"""Turns scores of two models into figures: a row per sample, then means with intervals per part of the data."""

import numpy as np

from vlmq_vllm.offline.compare.bootstrap import intervals
from vlmq_vllm.offline.compare.questions import Question
from vlmq_vllm.offline.compare.scores import Score, first_difference, kl

ABOUT = ("line", "splits", "tokens")  # of a sample; the rest of its row are figures


def sample_row(question: Question, teacher: Score, student: Score) -> dict:
    """The figures of one sample; means over its answer tokens, nats per token, shares from 0 to 1.

    greedy_same and first_difference are None when no answers were generated, first_difference also for equal ones.
    """
    row = {
        "line": question.chat["line"],
        "splits": question.splits,
        "tokens": len(teacher.answer),
        "kl": float(kl(teacher, student).mean()),
        "top1": float((teacher.best == student.best).mean()),
        "nll_teacher": -float(teacher.own.mean(dtype=np.float64)),
        "nll_student": -float(student.own.mean(dtype=np.float64)),
        "exact_teacher": float((teacher.best == teacher.answer).all()),
        "exact_student": float((student.best == student.answer).all()),
        "greedy_same": None,
        "first_difference": None,
    }
    if len(teacher.greedy):
        row["first_difference"] = first_difference(teacher.greedy, student.greedy)
        row["greedy_same"] = float(row["first_difference"] is None)
    for name in ("nll", "exact"):
        row[f"{name}_difference"] = row[f"{name}_student"] - row[f"{name}_teacher"]
    return row


def split_rows(rows: list[dict], seed: int) -> list[dict]:
    """{"split", "n", "tokens", figure: {"mean", "low", "high"}, ...} for all samples and for every part of them.

    Parts that hold all samples are left out. A figure that no sample has is None; bounds are None for one sample.
    """
    names = sorted({name for row in rows for name in row["splits"]}, key=lambda n: (n.startswith("task "), n))
    parts = {name: [row for row in rows if name in row["splits"]] for name in names}
    parts = {"all": rows} | {name: part for name, part in parts.items() if len(part) < len(rows)}
    return [_split(name, part, seed) for name, part in parts.items()]


def _split(name: str, rows: list[dict], seed: int) -> dict:
    names = [name for name in rows[0] if name not in ABOUT]
    columns = intervals(np.array([[row[figure] for figure in names] for row in rows], dtype=float), seed).T
    figures = {
        figure: None if np.isnan(column[0]) else _figure(column) for figure, column in zip(names, columns, strict=True)
    }
    return {"split": name, "n": len(rows), "tokens": sum(row["tokens"] for row in rows), **figures}


def _figure(column: np.ndarray) -> dict[str, float | None]:
    names = ("mean", "low", "high")
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, column, strict=True)}
