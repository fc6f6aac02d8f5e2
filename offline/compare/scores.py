"""Keeps what one model makes of a reference answer in little space, and computes the divergence of two models.

At every answer token the teacher's distribution is kept as k + 1 outcomes: its k likeliest tokens, each with its
log-probability, and "any other token" with the log of the remaining mass. The student is scored at the same k ids. The
KL divergence over these outcomes is at most that over the whole vocabulary (merging outcomes never adds divergence)
and equals it once k reaches the vocabulary. All logarithms are natural.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from vlmq_vllm.errors import CheckpointError

REALS = ("logs", "rest", "own")


@dataclass(frozen=True, eq=False)
class Score:
    """One sample under one model; T answer tokens, G greedily generated ones.

    answer [T] int32: ids of the reference answer. ids [T, k] int32: the teacher's likeliest tokens, likeliest first.
    logs [T, k] float32: log-probabilities at `ids`. rest [T] float32: log of the mass elsewhere, -inf if k is the
    vocabulary. own [T] float32: log-probability of the answer's token. best [T] int32: the likeliest token.
    greedy [G] int32: generated tokens, end mark included; empty when not asked for.
    """

    answer: np.ndarray
    ids: np.ndarray
    logs: np.ndarray
    rest: np.ndarray
    own: np.ndarray
    best: np.ndarray
    greedy: np.ndarray

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, np.asarray(value, np.float32 if name in REALS else np.int32))

    def check(self, whose: str, line: str) -> "Score":
        """Raises CheckpointError where a log-probability is not finite; `line` names the chat."""
        if not (np.isfinite(self.logs).all() and np.isfinite(self.own).all()):
            raise CheckpointError(f"{whose} answers {line} with NaN or infinity; its weights are not sound")
        return self


def kl(teacher: Score, student: Score) -> np.ndarray:
    """KL(teacher || student) over the k + 1 outcomes at every answer token: [T] float64, nats, never negative.

    Both sides are normalised first: stored as float32, their masses sum to one only within rounding.
    """
    p, q = _outcomes(teacher), _outcomes(student)
    mass = np.exp(p)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where there is no mass
        return np.where(mass > 0, mass * (p - q), 0.0).sum(-1).clip(min=0.0)


def _outcomes(score: Score) -> np.ndarray:
    """Normalised log-probabilities [T, k + 1] float64."""
    logs = np.concatenate([score.logs, score.rest[:, None]], axis=1).astype(np.float64)
    return logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)


def first_difference(one: np.ndarray, other: np.ndarray) -> int | None:
    """Number of equal tokens before the first that differs; None for equal answers."""
    if np.array_equal(one, other):
        return None
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def save(path: Path, scores: Sequence[Score | None], metadata: dict[str, str]) -> None:
    """Write scores as safetensors; None stands for a sample that was left out."""
    found = [score for score in scores if score is not None]
    tensors = {f.name: np.concatenate([getattr(score, f.name) for score in found]) for f in fields(Score)}
    lengths = [(-1, -1) if score is None else (len(score.answer), len(score.greedy)) for score in scores]
    save_file({**tensors, "lengths": np.array(lengths, dtype=np.int64)}, path, metadata)


def load(path: Path) -> list[Score | None]:
    """Back from a file of `save`. Raises what safetensors and numpy raise for a damaged one."""
    tensors = load_file(path)
    lengths = tensors.pop("lengths")
    kept = lengths[lengths[:, 0] >= 0]
    starts = np.concatenate([np.zeros((1, 2), dtype=np.int64), np.cumsum(kept, axis=0)])
    scores = iter([_slice(tensors, low, high) for low, high in zip(starts[:-1], starts[1:], strict=True)])
    return [next(scores) if tokens >= 0 else None for tokens, _ in lengths]


def _slice(tensors: dict[str, np.ndarray], low: np.ndarray, high: np.ndarray) -> Score:
    column = {name: int(name == "greedy") for name in tensors}
    return Score(**{name: tensor[low[column[name]] : high[column[name]]] for name, tensor in tensors.items()})
