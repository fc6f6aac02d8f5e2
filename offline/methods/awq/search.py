"""Searches channel scales (AWQ, 2306.00978, section 3.2; with token weights as in MBQ and QIG, 2603.17809).

For a group of linears with inputs x_n [I] an exponent r is chosen,

    s = m^r / sqrt(max m^r min m^r),     m = mean_n |x_n|, m^r at least 1e-4,     r = 0, 0.05 ... 0.95,

by the least loss of weights rounded under s (`losses.py`); equal losses go to the smaller r. Where columns share a
channel of what lies before them, m is their mean, and before s is tried it becomes what folds without loss
(`fold.py`). Groups are searched and folded in the order of the forward pass: a search sees the layer's own function,
which folding does not change, as is checked for every layer.

This departs from AWQ's code in one thing: a dead channel, m = 0, gets s = 1 and does not count in max and min. There
its m^r is the bound of 1e-4 for every r > 0, and one such channel makes all other s about 100 times larger.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.fold import PARITY, Changed, DtypeOf, effective, fold, moved
from vlmq_vllm.offline.methods.awq.losses import Trial, candidate_losses
from vlmq_vllm.offline.methods.awq.scalable import Scalable, find_scalable
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import GridSearch
from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.groups import Group
from vlmq_vllm.offline.model.hooks import InputRounding
from vlmq_vllm.offline.model.layers import linear_of, linears_of, set_parameter
from vlmq_vllm.offline.model.streams import Stream

RATIOS = tuple(step / 20 for step in range(20))
LEAST = 1e-4  # of m^r


@dataclass(frozen=True)
class Scaled:
    """What became of a layer. ratios: r of every linear, None where nothing can be scaled or no token counts.

    changed: parameters that are not quantised afterwards, by their names in the layer, in the dtype of `dtype_of`.
    """

    ratios: dict[str, float | None]
    changed: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scaling:
    """What the search needs besides a layer and its streams. search: how rounding to nearest finds its grids. loss:
    "mae" or "mse". inputs: what 8-bit activations do to what a linear reads, [.., I] to [.., I], or None."""

    search: GridSearch
    ranks: Ranks
    loss: str = "mae"
    inputs: InputRounding | None = None

    @torch.no_grad()
    def __call__(
        self,
        layer: torch.nn.Module,
        index: int,
        family: Family,
        stages: list[list[Group]],
        streams: list[Stream],
        token_weights: Mapping[str, list[torch.Tensor]],
        format_of: Callable[[str], WeightFormat | None],
        dtype_of: DtypeOf,
    ) -> Scaled:
        """Scale the groups of layer `index` in its place, in new parameters; `streams` stand before it.

        token_weights: [N] per batch, by linear; a group takes those of its first linear that has some.
        format_of: of a linear, None where it is not quantised: then its group is left alone. dtype_of: of a parameter
        by its name in the layer, the 16-bit dtype of its values; a weight's is that of its scales. Raises QuantizeError
        where folding moves the layer's output.
        """
        formats = {linear: format for linear in linears_of(layer) if (format := format_of(linear)) is not None}

        def rounded(linear: str, weight: torch.Tensor) -> torch.Tensor:
            return round_to_nearest(weight, formats[linear], dtype_of(f"{linear}.weight"), self.search).served()

        probe = min(streams, key=lambda stream: stream.hidden.numel(), default=None)
        before = probe.call(layer, index) if probe else None
        ratios: dict[str, float | None] = {}
        changed: Changed = {}
        for stage in stages:
            ratios |= dict.fromkeys(linear for group in stage for linear in group)
            found = [one for one in find_scalable(layer, stage, family) if _all_quantised(one, formats)]
            reached = self._means(layer, index, found, streams)
            if not reached:
                continue
            found_by, trials = [], []
            for scalable, mean in reached:
                foldable = [effective(layer, scalable, scales_of(mean, ratio), dtype_of) for ratio in RATIOS]
                own = next((token_weights[name] for name in scalable.linears if name in token_weights), None)
                trials.append(Trial(scalable, [scales for scales, _ in foldable], own))
                found_by.append(foldable)
            losses_of = self.ranks.add(candidate_losses(layer, index, streams, trials, rounded, self.inputs, self.loss))
            for trial, foldable, (*losses, total) in zip(trials, found_by, losses_of.tolist(), strict=True):
                if total > 0:
                    best = _least(losses)
                    ratios |= dict.fromkeys(trial.scalable.linears, RATIOS[best])
                    if RATIOS[best]:
                        scales, divided = foldable[best]
                        fold(layer, trial.scalable, scales, divided)
                        changed |= divided
        self._check(layer, index, probe, before)
        stored = {name: value.to(dtype_of(name)) for name, value in changed.items()}
        for name, value in stored.items():  # a norm's bias is rounded only here
            set_parameter(layer, name, value.float())
        return Scaled(ratios, stored)

    def _means(
        self, layer: torch.nn.Module, index: int, found: list[Scalable], streams: list[Stream]
    ) -> list[tuple[Scalable, torch.Tensor]]:
        """Those groups that tokens reach, with the mean |x| [R] float32 over all ranks' tokens of what each reads."""
        sums = {}
        for scalable in found:
            linear = linear_of(layer, scalable.linears[0])
            sums[scalable.linears[0]] = linear.weight.new_zeros(linear.in_features + 1, dtype=torch.float64)

        def visit(linear: str, inputs: torch.Tensor) -> None:
            sums[linear][:-1] += inputs.abs().sum(0, dtype=torch.float64)
            sums[linear][-1] += len(inputs)

        for stream in streams if found else ():
            stream.inputs_of(layer, index, sums, visit)
        means = []
        for scalable, total in zip(found, sums.values(), strict=True):
            added = self.ranks.add(total).cpu()  # where bincount has an order
            mean = torch.bincount(scalable.channel, added[:-1] / added[-1]) / torch.bincount(scalable.channel)
            if added[-1] > 0:
                means.append((scalable, mean.float().to(total.device)))
        return means

    def _check(self, layer: torch.nn.Module, index: int, probe: Stream | None, before: torch.Tensor | None) -> None:
        """The layer's output [B, T, d] on the probe must be what it was before; all ranks raise if one of them must."""
        error = 0.0 if probe is None or before is None else moved(probe.hidden, before, probe.call(layer, index))
        if self.ranks.any(not error < PARITY):
            raise QuantizeError(
                f"scaling layer {index} moved its output by {error:.1e} of what it adds to a token ({PARITY:.0e} at "
                "most); its parts are joined in a way that vlmq does not know: please report it, or leave scaling out"
            )


def scales_of(mean: torch.Tensor, ratio: float) -> torch.Tensor:
    """s [R] float32 for mean |x| [R] float32 and the exponent `ratio`; 1 where the mean is 0."""
    powers, dead = mean.pow(ratio).clamp_min(LEAST), mean == 0
    middle = (powers.masked_fill(dead, 0).max() * powers.masked_fill(dead, math.inf).min()).sqrt()
    return torch.where(dead, 1.0, powers / middle)


def _least(losses: list[float]) -> int:
    """The number of the least loss, the first of equal ones; one that is not finite comes after all others."""
    return min(range(len(losses)), key=lambda i: (not losses[i] < math.inf, losses[i]))


def _all_quantised(scalable: Scalable, quantised: Collection[str]) -> bool:
    """Whether every linear whose weight would change is quantised afterwards."""
    linears = scalable.linears if scalable.offset is not None else (scalable.source, *scalable.linears)
    return all(linear in quantised for linear in linears)
