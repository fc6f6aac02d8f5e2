"""Computes bits per weight of a configuration, scales and zero points included.

Two averages: over the weights of the study's linears, where a linear at 16 bits counts 16, and over every parameter of
the model's files as they would be written.
"""

import math
from dataclasses import replace

from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import Target, expected_bytes
from vlmq_vllm.offline.settings.quantize import KEPT
from vlmq_vllm.offline.sweep.parts import Part


class Sizes:
    """Averages for the linears `targets`. `widths`: by in-memory name, 16 where one is missing."""

    def __init__(self, source: Source, targets: list[Target]) -> None:
        self.source, self.targets = source, targets
        self.weights = sum(target.rows * target.columns for target in targets)
        self.parameters = sum(math.prod(info.shape) for info in source.headers.values())

    def shares(self, parts: list[Part]) -> list[float]:
        """Of the parts in the study's weights."""
        weights = {target.name: target.rows * target.columns for target in self.targets}
        return [sum(weights[linear] for linear in part.linears) / self.weights for part in parts]

    def bits_per_weight(self, widths: dict[str, int]) -> float:
        """Over the weights of the study's linears."""
        return sum(linear_bits(t, widths.get(t.name, KEPT)) for t in self.targets) / self.weights

    def bits_per_parameter(self, widths: dict[str, int]) -> float:
        """Over all parameters of the model."""
        packed = [
            at_width(target, widths[target.name]) for target in self.targets if widths.get(target.name, KEPT) != KEPT
        ]
        return 8 * expected_bytes(self.source, packed) / self.parameters


def linear_bits(target: Target, width: int) -> int:
    """Bits on disk of a linear at `width`."""
    return KEPT * target.rows * target.columns if width == KEPT else round(at_width(target, width).packed_bits)


def at_width(target: Target, width: int) -> Target:
    """A linear to be quantised, in the same format with `width` bits."""
    return replace(target, format=replace(target.format, bits=width))
