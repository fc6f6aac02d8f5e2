"""Mixes widths within a budget: turns the modules' rises into widths, controls, and a recipe.

The budget is an average over the weights of the study's linears, scales and zero points included. Controls are blind
mixtures of at most its size: modules in random order get the next width as long as it fits.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.targets import Target
from vlmq_vllm.offline.settings.quantize import KEPT
from vlmq_vllm.offline.settings.sweep import UNCALIBRATED, StudySettings
from vlmq_vllm.offline.sweep.knapsack import Choice, allocate, isotonic
from vlmq_vllm.offline.sweep.parts import Part, Subject
from vlmq_vllm.offline.sweep.sizes import linear_bits


@dataclass(frozen=True)
class Mixture:
    """widths: of the modules, in their order. rise: sum of their rises, nats. pooled: modules for which a wider width
    had measured worse, so that rises were averaged."""

    widths: tuple[int, ...]
    rise: float
    pooled: list[str]


class Budget:
    """Sizes of the modules at every width, and how many bits there are. Raises RefusedError for an impossible budget,
    naming the possible range."""

    def __init__(self, subject: Subject, modules: list[Part], levels: tuple[int, ...], average: float) -> None:
        targets = {target.name: target for target in subject.targets}
        self.modules = modules
        self.bits = [
            {width: sum(linear_bits(targets[name], width) for name in module.linears) for width in levels}
            for module in modules
        ]
        weights = sum(target.rows * target.columns for target in subject.targets)
        self.total = average * weights
        least = sum(sizes[min(levels)] for sizes in self.bits)
        if self.total < least:
            raise RefusedError(
                f"a budget of {average} bits per weight cannot be met with {min(levels)} bits and scales: give "
                f"{_up(least / weights)} or more, narrower --bits or larger groups"
            )

    def mix(self, rises: list[dict[int, float]]) -> Mixture:
        """The mixture with the least sum of rises (by width, for every module; 16 bits have none)."""
        smooth = [isotonic(found) | {KEPT: 0.0} for found in rises]
        pooled = [
            module.name
            for module, found in zip(self.modules, rises, strict=True)
            if any(found[wide] > found[narrow] for wide in found for narrow in found if wide > narrow)
        ]
        choices = [
            [Choice(width, sizes[width], values[width]) for width in sizes]
            for sizes, values in zip(self.bits, smooth, strict=True)
        ]
        found = allocate(choices, self.total)
        return Mixture(tuple(choice.width for choice in found), sum(choice.rise for choice in found), pooled)

    def expected(self, uniform: dict[int, float]) -> float:
        """KL to be expected of a blind mixture within the budget if damages add up: with `uniform`, the KL of all
        modules at one width (16 bits have none), in proportion to the bits between the sizes of two of these."""
        sizes = [sum(own[width] for own in self.bits) for width in self.bits[0]]
        return float(np.interp(self.total, sizes, [uniform.get(width, 0.0) for width in self.bits[0]]))

    def controls(self, seed: int, count: int) -> list[tuple[int, ...]]:
        """The different ones of `count` blind mixtures, none of which is uniform: those are in every study anyway."""
        drawn = dict.fromkeys(self.blind(seed + i) for i in range(count))
        return [widths for widths in drawn if len(set(widths)) > 1]

    def blind(self, seed: int) -> tuple[int, ...]:
        """Widths that know nothing of the modules but their sizes: the greatest common width that fits, and in random
        order the next one for as many modules as it fits for."""
        levels = list(self.bits[0])
        fitting = [width for width in levels if sum(sizes[width] for sizes in self.bits) <= self.total]
        widths = [fitting[-1]] * len(self.bits)
        if fitting[-1] == levels[-1]:
            return tuple(widths)
        wider = levels[levels.index(fitting[-1]) + 1]
        used = sum(sizes[fitting[-1]] for sizes in self.bits)
        for number in random.Random(seed).sample(range(len(widths)), len(widths)):
            more = self.bits[number][wider] - self.bits[number][fitting[-1]]
            if used + more <= self.total:
                widths[number], used = wider, used + more
        return tuple(widths)


def recipe_of(subject: Subject, widths: dict[str, int], settings: StudySettings, calibrated: bool) -> dict:
    """A recipe of `vlmq quantize` for these linears (in-memory names) at these widths and all others at 16 bits.

    Overrides of the decoder's commonest width stand under `modules`, by names in the files. How weights are rounded
    is left to the tool's defaults, which do better than the study's plain solver, and to the command line; only a study
    without calibration data names a method, one that needs none.
    """
    decoder = [target for target in subject.targets if target.component == "language"]
    weights: Counter[int] = Counter()
    for target in decoder:
        if widths[target.name] != KEPT:
            weights[widths[target.name]] += target.rows * target.columns
    default = weights.most_common(1)[0][0] if weights else min(settings.bits)
    modules: dict[str, int] = {} if decoder else {"*": KEPT}
    for target in subject.targets:
        if widths[target.name] != (default if target.component == "language" else KEPT):
            modules[_pattern(target)] = widths[target.name]
    return {
        "bits": default,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
        **({} if calibrated else {"method": UNCALIBRATED[0]}),
        "modules": modules,
    }


def _pattern(target: Target) -> str:
    """The linear's name in the files; of an expert, that of all experts of its layer."""
    return re.sub(r"\.\d+\.(?=[^.]+$)", ".*.", target.module) if is_expert(target.name) else target.module


def _up(value: float) -> str:
    """With two digits after the point, rounded up, so that the number itself is possible."""
    return f"{-(-value * 100 // 1) / 100:.2f}"
