"""Rounds a weight on clipping ranges that a factor widens or narrows: what Q-VLM searches and learns for weights.

The ranges that the search starts from minimise an L_p distance, as the paper's do (2410.08119, section 4.1; p is not
given there, `methods/grid.py` has 2.4). A factor multiplies the range of every group, and with it the scale; the zero
point stays. It stands for the paper's percentiles {1, .995, .99, .985, .98} of activations: a group of 64 or 128
weights has no 99.5th percentile. A layer's linears share it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.methods.grid import MSE, GridSearch, find_grid, on_grid
from vlmq_vllm.offline.model.layers import weights_of
from vlmq_vllm.offline.model.source import Source

# The first wins ties and is the L_p search's own. On the demo model, offered 0.8 to 1.2, layers chose 1.05 to 1.2 at 2
# bits (groups of 128), 1 to 1.2 at 3 and 0.95 to 1.1 at 4 (one group per row). 1.35 is there because 1.2 was the end.
FACTORS = (1.0, 0.9, 0.95, 1.05, 1.1, 1.2, 1.35)

FormatOf = Callable[[str], WeightFormat | None]  # of a linear by its in-memory name; None where it stays as it is


@dataclass(frozen=True)
class Ranges:
    """The grid of a weight: scale [O, G] in the dtype that is stored, zero point [O, G] uint8 or None."""

    format: WeightFormat
    scale: torch.Tensor
    zero: torch.Tensor | None

    def rounded(self, weight: torch.Tensor, factor: float | torch.Tensor = 1.0) -> QuantizedWeight:
        """A weight [O, I] float32 on the grid, its ranges times `factor` (a number or [O, G], positive)."""
        return on_grid(weight, self.format, self.scaled(factor), self.zero)

    def scaled(self, factor: float | torch.Tensor) -> torch.Tensor:
        """The scales times `factor`, in their dtype and not below its smallest normal number."""
        dtype = self.scale.dtype
        return (self.scale.float() * factor).clamp_min(torch.finfo(dtype).smallest_normal).to(dtype)


def find_ranges(weight: torch.Tensor, format: WeightFormat, dtype: torch.dtype, search: GridSearch = MSE) -> Ranges:
    """The ranges with the least L_p distance for a weight [O, I] float32; scales in `dtype`."""
    return Ranges(format, *find_grid(weight, format, dtype, search))


def ranges_in(
    source: Source, name: str, layer: torch.nn.Module, format_of: FormatOf, search: GridSearch
) -> dict[str, Ranges]:
    """Those of a layer's linears that are quantised, by their names in it. name: its in-memory name."""
    found = {}
    for linear, weight in weights_of(layer).items():
        full = f"{name}.{linear}"
        if (format := format_of(full)) is not None:
            found[linear] = find_ranges(weight, format, source.stored_dtype(f"{full}.weight"), search)
    return found
