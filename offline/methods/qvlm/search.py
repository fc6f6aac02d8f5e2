"""Searches which of a few candidates each layer of a block takes (Q-VLM, 2410.08119, equations 2 and 3).

Greedy (eq. 2) goes layer by layer: each takes the candidate with the least error at its own output, after the layers
that have chosen before it. Joint (eq. 3) looks at the error at the output of the block's last layer alone. The paper
does not say how the joint space is searched; here it is coordinate descent that starts from the greedy choice and
takes a change only if it lowers the block's error, so that it is never above that of greedy, and for a block of one
layer the two are the same.

A layer may be anything that turns a state into another (`step`), and a candidate is a number. `block_quantizer.py` says
what they stand for.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")
SWEEPS = 3  # over the layers of a block; later ones change next to nothing


@dataclass(frozen=True)
class BlockChoice:
    """Candidates of a block's layers, by number, and the error at its output: jointly searched, and by greedy alone."""

    joint: tuple[int, ...]
    error: float
    greedy: tuple[int, ...]
    greedy_error: float


def search(
    depth: int,
    candidates: int,
    start: State,
    step: Callable[[int, int, State], State],
    error: Callable[[int, State], float],
) -> BlockChoice:
    """Choose for a block of `depth` layers among `candidates` each; of equal ones the first.

    step(k, c, state): the output of the block's layer k with candidate c for the input `state`, which it leaves as it
    is. error(k, state): how far an output of layer k is from what it should be.
    """
    states, chosen, least = [start], [], 0.0
    for k in range(depth):
        tried = []
        for c in range(candidates):
            state = step(k, c, states[k])
            tried.append(error(k, state))
            if c == _first_least(tried):
                best = state
        states.append(best)
        chosen.append(_first_least(tried))
        least = min(tried)
    greedy, greedy_error = tuple(chosen), least
    for _ in range(SWEEPS if depth > 1 else 0):
        before = least
        for k in range(depth):
            old = chosen[k]
            for c in range(candidates):
                if c == old:
                    continue
                trial = [*chosen[:k], c, *chosen[k + 1 :]]
                found = error(depth - 1, deque(_outputs(trial, k, states[k], step), maxlen=1)[0])
                if found < least:
                    least, chosen = found, trial
            if chosen[k] != old:
                states[k + 1 :] = _outputs(chosen, k, states[k], step)
        if least == before:
            break
    return BlockChoice(tuple(chosen), least, greedy, greedy_error)


def _first_least(errors: list[float]) -> int:
    return errors.index(min(errors))


def _outputs(choices: list[int], first: int, state: State, step: Callable[[int, int, State], State]) -> Iterator[State]:
    """The outputs of layers `first` and later, for the input `state` of the first."""
    for k in range(first, len(choices)):
        state = step(k, choices[k], state)
        yield state
