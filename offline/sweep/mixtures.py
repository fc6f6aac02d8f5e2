"""Mixes widths within a budget: turns the modules' rises into widths, and these into a recipe.

The budget is an average over the weights of the study's linears, scales and zero points included.
"""

import math
import re
from collections import Counter

import numpy as np

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.settings.quantize import KEPT
from vlmq_vllm.offline.settings.sweep import UNCALIBRATED, StudySettings
from vlmq_vllm.offline.sweep.knapsack import allocate
from vlmq_vllm.offline.sweep.parts import Part, Subject
from vlmq_vllm.offline.sweep.sizes import linear_bits


class Budget:
    """`bits`: sizes of the modules at every level [M, L] int64; `total`: how many there are. Raises RefusedError for
    an impossible budget, naming the least that is possible."""

    def __init__(self, subject: Subject, modules: list[Part], levels: tuple[int, ...], average: float) -> None:
        targets = {target.name: target for target in subject.targets}
        self.modules, self.levels = modules, levels
        self.bits = np.array(
            [[sum(linear_bits(targets[name], width) for name in part.linears) for width in levels] for part in modules]
        )
        weights = sum(target.rows * target.columns for target in subject.targets)
        self.total = average * weights
        least = int(self.bits[:, 0].sum())
        if self.total < least:
            raise RefusedError(
                f"a budget of {average} bits per weight cannot be met with {levels[0]} bits and scales: give "
                f"{math.ceil(100 * least / weights) / 100:.2f} or more, narrower --bits or larger groups"
            )

    def mix(self, rises: list[dict[int, float]]) -> tuple[tuple[int, ...], float, list[str]]:
        """The widths of the modules with the least sum of rises (by width, for every module; 16 bits have none), that
        sum in nats, and the modules for which a wider width had measured worse, so that rises were averaged."""
        measured = np.array([[found[width] for width in self.levels[:-1]] for found in rises])
        smooth = np.pad(np.apply_along_axis(isotonic, 1, measured), ((0, 0), (0, 1)))
        chosen = allocate(self.bits, smooth, self.total)
        worse = np.any(np.diff(measured) > 0, axis=1).tolist()
        pooled = [module.name for module, found in zip(self.modules, worse, strict=True) if found]
        return tuple(self.levels[i] for i in chosen), float(smooth[range(len(chosen)), chosen].sum()), pooled

    def expected(self, uniform: dict[int, float]) -> float:
        """KL to be expected of widths mixed at random within the budget if damages add up: with `uniform`, the KL of
        all modules at one width, in proportion to the bits between the sizes of two of these."""
        return float(np.interp(self.total, self.bits.sum(0), [uniform.get(width, 0.0) for width in self.levels]))


def isotonic(rises: np.ndarray) -> np.ndarray:
    """The nearest rises [W] in least squares, by falling size, that are not negative: measured ones are noisy, so that
    a wider width may look worse."""
    from scipy.optimize import isotonic_regression

    return isotonic_regression(rises, increasing=False).x.clip(min=0)


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
            name = target.module
            if is_expert(target.name):  # that of all experts of its layer
                name = re.sub(r"\.\d+\.(?=[^.]+$)", ".*.", name)
            modules[name] = widths[target.name]
    return {
        "bits": default,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
        **({} if calibrated else {"method": UNCALIBRATED[0]}),
        "modules": modules,
    }
