"""The search inside a block: which of a few candidates each layer takes (Q-VLM, 2410.08119, equations 2 and 3).

Greedy (eq. 2) goes layer by layer: each takes the candidate with the least error at its own output, behind the layers
that have chosen before it. Joint (eq. 3) looks at the error at the output of the block's last layer alone. The paper
does not say how the joint space is searched; here it is coordinate descent that starts from the greedy choice and
takes a change only if it lowers the block's error, so that it is never above that of greedy, and for a block of one
layer the two are the same.

A layer may be anything that turns a state into another (`step`), a candidate is a number. What they stand for is
`block_quantizer.py`'s business for weights, and `fake.py`'s for activations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")
SWEEPS = 3  # over the layers of a block; later ones change next to nothing


@dataclass(frozen=True)
class Choice:
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
    sweeps: int = SWEEPS,
) -> Choice:
    """Choose for a block of `depth` layers among `candidates` each; of equal ones the first.

    step(k, c, state): the state behind the block's layer k with candidate c, given that in front of it, which it
    leaves as it is. error(k, state): how far a state behind layer k is from what it should be.
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
    for _ in range(sweeps if depth > 1 else 0):
        before = least
        for k in range(depth):
            old = chosen[k]
            for c in range(candidates):
                if c == old:
                    continue
                trial = [*chosen[:k], c, *chosen[k + 1 :]]
                found = error(depth - 1, _run(trial, k, states[k], step))
                if found < least:
                    least, chosen = found, trial
            if chosen[k] != old:
                states[k + 1 :] = _states(chosen, k, states[k], step)
        if least == before:
            break
    return Choice(tuple(chosen), least, greedy, greedy_error)


def _first_least(errors: list[float]) -> int:
    return errors.index(min(errors))


def _run(choices: list[int], first: int, state: State, step: Callable[[int, int, State], State]) -> State:
    for k in range(first, len(choices)):
        state = step(k, choices[k], state)
    return state


def _states(choices: list[int], first: int, state: State, step: Callable[[int, int, State], State]) -> list[State]:
    """The states behind layers `first` and later."""
    found = []
    for k in range(first, len(choices)):
        state = step(k, choices[k], state)
        found.append(state)
    return found
