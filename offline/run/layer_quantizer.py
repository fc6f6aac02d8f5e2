"""Quantises a stack layer by layer: weighs tokens, sums Hessians, solves, puts the result in its place, goes on.

Two streams run through the stack, U after the quantised layers and F after the full-precision ones (where a method
needs it). Within a layer the stages are quantised in the order of the forward pass, and each stage's Hessians are
summed after the stages before it have been replaced, unless a method does not calibrate in sequence. Where channels
are scaled (AWQ), that comes first, for the whole layer. One layer's weights are in memory at a time.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.choose import grid_of, solver_of
from vlmq_vllm.offline.methods.gptq.problem import Problem, collect, find_problems, solve_all
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.solution import Row, Solution
from vlmq_vllm.offline.model.groups import Group, find_stages
from vlmq_vllm.offline.model.layers import holding, linears_of, parameters_of, put, set_parameter, with_parameters
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.settings.quantize import Settings


class LayerQuantizer:
    """Quantises layers in turn, with the streams before the next one; without streams weights are rounded as they come.

    formats: of every linear that is quantised, by its in-memory name. weigh: gives token weights (`methods/saliency/`).
    scale: folds channel scales into a layer (`methods/awq/`). `quantized` moves on after the quantised layers, unless
    the settings say that layers are not calibrated in sequence.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        formats: dict[str, WeightFormat],
        device: torch.device,
        ranks: Ranks,
        quantized: list[Stream],
        full: list[Stream],
        weigh: Callable | None = None,
        scale: Callable | None = None,
    ) -> None:
        self.source, self.settings, self.formats, self.device, self.ranks = source, settings, formats, device, ranks
        self.quantized, self.full = quantized, full
        self.weigh, self.scale = weigh, scale
        self.solver = solver_of(settings)

    @torch.no_grad()
    def layer(self, name: str, index: int, last: bool = False) -> tuple[dict[str, torch.Tensor], list[Row]]:
        """Quantise layer `index` (in-memory name `name`): tensors by their names in the files, and report rows.

        last: nothing comes after it, so that the streams need not move on.
        """
        layer = self.source.materialise(name, self.device)
        originals = parameters_of(layer)
        weights, tokens, ratios = {}, {}, {}
        if self.weigh and self._linears(layer, name):
            streams = self.full, self.quantized
            weights, tokens = self.weigh(layer, index, *streams, lambda: holding(layer, self._all_rounded(layer, name)))
        stages = self.stages(layer, index, name)
        tensors: dict[str, torch.Tensor] = {}
        rows = []
        if self.scale:
            ratios, tensors = self._scaled(layer, index, name, stages, weights)
            weights = {}  # MBQ and QIG weight the search for scales, and not that for clipped ranges
        for stage in stages:
            for linear, solution in self.solve(layer, index, name, stage, weights, originals):
                module = self.source.module_in_files(_full(name, linear))
                tensors |= {f"{module}.{part}": t for part, t in solution.weight.tensors().items()}
                loss = None if solution.loss is None else float(solution.loss.mean())
                base = self._base(stage) if loss is not None and self.solver.compensate else None
                told = tokens.get(linear, "equal"), base, ratios.get(linear)
                rows.append(Row(module, loss, solution.damp, solution.dead, *told))
        if not last:
            self._advance(layer, index, originals)
        self.source.release(name)
        return tensors, rows

    @torch.no_grad()
    def replay(self, name: str, index: int) -> None:
        """Move both streams past a layer that has been quantised before."""
        if self.quantized:
            layer = self.source.materialise(name, self.device)
            originals = parameters_of(layer)
            for inner, value in self.source.written(name).items():
                set_parameter(layer, inner, value.to(self.device, torch.float32))
            self._advance(layer, index, originals)
            self.source.release(name)

    def _advance(self, layer: torch.nn.Module, index: int, originals: dict[str, torch.Tensor]) -> None:
        with with_parameters(layer, originals):
            for stream in self.full if self.settings.sequential else self.full + self.quantized:
                stream.hidden = stream.run(layer, index)
        for stream in self.quantized if self.settings.sequential else []:
            stream.hidden = stream.run(layer, index)

    def stages(self, layer: torch.nn.Module, index: int, name: str) -> list[list[Group]]:
        """The stages of the layer, of linears that are quantised; without data every linear is one."""
        own = self._linears(layer, name)
        if not (self.settings.row.solves and own):
            return [[(linear,)] for linear in own]
        found = self.ranks.first(find_stages(layer, index, self.quantized[0]) if self.quantized else None)
        if not found:
            raise QuantizeError(
                "no calibration sample reaches a part of the model that is to be quantised; add pictures"
            )
        groups = ([tuple(linear for linear in group if linear in own) for group in stage] for stage in found)
        return [kept for stage in groups if (kept := [group for group in stage if group])]

    def _linears(self, layer: torch.nn.Module, name: str) -> list[str]:
        """Those of the layer that are quantised."""
        return [linear for linear in linears_of(layer) if _full(name, linear) in self.formats]

    def _scaled(self, layer, index, name, stages, weights) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
        """Scale the layer's channels: exponents by linear, and what else of it has changed, by its name in the files.

        Scales are judged by weights and inputs as they come: where inputs are rounded, `scale` does it itself.
        """
        streams = [replace(stream, rounded=frozenset()) for stream in self.quantized]
        found = self.scale(
            layer,
            index,
            stages,
            streams,
            weights,
            lambda linear: self.formats.get(_full(name, linear)),
            lambda inner: self.source.stored_dtype(_full(name, inner)),
        )
        tensors = {}
        for inner, value in found.changed.items():
            full = _full(name, inner)
            tensors[self.source.places[full].tensor] = self.source.restored(full, value)
        return found.ratios, tensors

    def solve(self, layer, index, name, stage, weights, originals) -> Iterator[tuple[str, Solution]]:
        """Solve a stage and put the results in their places, rounded as they will be served."""
        if not self.settings.row.solves:
            for (linear,) in stage:
                yield self._placed(layer, linear, Solution(self._rounded(layer, name, linear), None, None, 0))
            return
        problems = self.problems(layer, index, name, stage, weights, originals)
        solutions = solve_all(problems, layer, self.solver, self.ranks)
        for problem, solution in zip(problems, solutions, strict=True):
            for linear, part in zip(problem.linears, solution.split(problem.rows), strict=True):
                yield self._placed(layer, linear, part)

    def problems(self, layer, index, name, stage, weights, originals) -> list[Problem]:
        """The problems of a stage, with the Hessians of their inputs."""
        format_of, dtype_of = functools.partial(self._format, name), functools.partial(self._dtype, name)
        problems = find_problems(layer, stage, weights, self._base(stage), format_of, dtype_of, self.device)
        collect(problems, layer, index, self.quantized, self.full, originals)
        return problems

    def _base(self, stage: list[Group]) -> str:
        """The two streams send different tokens to an expert: there is no residual between them."""
        return self.settings.base if len(stage) == 1 and self.settings.residual else "gptq"

    def _placed(self, layer: torch.nn.Module, linear: str, solution: Solution) -> tuple[str, Solution]:
        if self.settings.sequential:
            put(layer, linear, solution.weight.served())
        return linear, solution

    def _format(self, name: str, linear: str) -> WeightFormat:
        return self.formats[_full(name, linear)]

    def _dtype(self, name: str, linear: str) -> torch.dtype:
        """Of the weight in the source, which the scales get."""
        return self.source.stored_dtype(f"{_full(name, linear)}.weight")

    def _rounded(self, layer: torch.nn.Module, name: str, linear: str) -> QuantizedWeight:
        weight = layer.get_submodule(linear).weight
        return round_to_nearest(weight, self._format(name, linear), self._dtype(name, linear), grid_of(self.settings))

    def _all_rounded(self, layer: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
        return {linear: self._rounded(layer, name, linear).served() for linear in self._linears(layer, name)}


def _full(name: str, linear: str) -> str:
    return f"{name}.{linear}"
