"""Quantises a stack layer by layer: weighs tokens, sums Hessians, solves, puts the result in its place, goes on.

Two streams run through the stack, U after the quantised layers and F after the full-precision ones (where a method
needs it). Within a layer the stages are quantised in the order of the forward pass, and each stage's Hessians are
summed after the stages before it have been replaced, unless a method does not calibrate in sequence. Where channels
are scaled (AWQ), that comes first, for the whole layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.choose import grid_of, solver_of
from vlmq_vllm.offline.methods.gptq.problem import collect, find_problems, solve_all
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.saliency.concentration import effective_tokens
from vlmq_vllm.offline.methods.saliency.weigher import TokenWeigher, Weights
from vlmq_vllm.offline.methods.solution import Row, Solution
from vlmq_vllm.offline.model.groups import Group, find_stages
from vlmq_vllm.offline.model.layers import holding, linear_of, linears_of, put, with_parameters
from vlmq_vllm.offline.model.source import DTYPES, Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.settings.quantize import Settings


@dataclass(frozen=True)
class Layer:
    """A layer in the making: its place in the stack, its in-memory name, its full-precision parameters by their names
    in it, and those of its linears that are quantised."""

    module: torch.nn.Module
    index: int
    name: str
    originals: Mapping[str, torch.Tensor]
    linears: list[str]

    def full(self, inner: str) -> str:
        """The in-memory name of what is called `inner` in the layer."""
        return f"{self.name}.{inner}"


@dataclass
class LayerQuantizer:
    """Quantises layers in turn, with the streams before the next one; without streams weights are rounded as they come.

    formats: of every linear that is quantised, by its in-memory name. weigh: gives token weights (`methods/saliency/`).
    scale: folds channel scales into a layer (`methods/awq/`). learnt: rounds a weight, by its linear's in-memory name,
    where how to round was learnt beforehand (`methods/qvlm/`).
    """

    source: Source
    settings: Settings
    formats: dict[str, WeightFormat]
    device: torch.device
    ranks: Ranks
    quantized: list[Stream]
    full: list[Stream]
    weigh: TokenWeigher | None = None
    scale: Scaling | None = None
    learnt: Callable[[str, torch.Tensor], QuantizedWeight] | None = None

    def __post_init__(self) -> None:
        self.solver = solver_of(self.settings)

    @torch.no_grad()
    def layer(self, name: str, index: int, last: bool = False) -> tuple[dict[str, torch.Tensor], list[Row]]:
        """Quantise layer `index` (in-memory name `name`): tensors by their names in the files, and report rows.

        last: nothing comes after it, so that the streams need not move on.
        """
        layer = self.layer_of(self.source.materialise(name, self.device), name, index)
        token_weights, tokens = self._weighed(layer)
        effective = {linear: effective_tokens(found, self.ranks) for linear, found in token_weights.items()}
        stages = self.stages(layer)
        ratios: dict[str, float | None] = {}
        tensors: dict[str, torch.Tensor] = {}
        rows = []
        if self.scale:
            ratios, tensors = self.scaled(self.scale, layer, stages, token_weights)
            token_weights = {}  # MBQ and QIG weight the search for scales, and not that for clipped ranges
        for stage in stages:
            for linear, solution in self.solve(layer, stage, token_weights):
                module = self.source.module_in_files(layer.full(linear))
                tensors |= {f"{module}.{part}": t for part, t in solution.weight.tensors().items()}
                loss = None if solution.loss is None else float(solution.loss.mean())
                base = self._base(stage) if loss is not None and self.solver.compensate else None
                told = tokens.get(linear, "equal"), base, ratios.get(linear), effective.get(linear)
                rows.append(Row(module, loss, solution.damp, solution.dead, *told, solution.refined))
        if not last:
            self._advance(layer)
        self.source.release(name)
        return tensors, rows

    @torch.no_grad()
    def replay(self, name: str, index: int) -> None:
        """Move both streams past a layer that has been quantised before."""
        if self.quantized:
            layer = self.layer_of(self.source.materialise(name, self.device), name, index)
            self.source.materialise(name, self.device, quantized=True)
            self._advance(layer)
            self.source.release(name)

    def layer_of(self, module: torch.nn.Module, name: str, index: int) -> Layer:
        """Layer `index` (in-memory name `name`) that has been loaded with its full-precision weights."""
        linears = [linear for linear in linears_of(module) if f"{name}.{linear}" in self.formats]
        return Layer(module, index, name, dict(module.named_parameters()), linears)

    def _weighed(self, layer: Layer) -> tuple[Weights, dict[str, str]]:
        """Token weights of the layer's linears, and what the report says of them; nothing where all tokens count
        alike."""
        if not (self.weigh and layer.linears):
            return {}, {}

        def rounding() -> AbstractContextManager:
            return holding(layer.module, {linear: self._nearest(layer, linear).served() for linear in layer.linears})

        return self.weigh(layer.module, layer.index, self.full, self.quantized, rounding)

    def _advance(self, layer: Layer) -> None:
        with with_parameters(layer.module, layer.originals):
            for stream in self.full if self.settings.sequential else self.full + self.quantized:
                stream.hidden = stream.run(layer.module, layer.index)
        for stream in self.quantized if self.settings.sequential else []:
            stream.hidden = stream.run(layer.module, layer.index)

    def stages(self, layer: Layer) -> list[list[Group]]:
        """The stages of the layer, of linears that are quantised; without data every linear is one."""
        own = layer.linears
        if not (self.settings.row.solves and own):
            return [[(linear,)] for linear in own]
        some = find_stages(layer.module, layer.index, self.quantized[0]) if self.quantized else None
        found = self.ranks.first(some)
        if not found:
            raise QuantizeError(
                "no calibration sample reaches a part of the model that is to be quantised; add pictures"
            )
        groups = ([tuple(linear for linear in group if linear in own) for group in stage] for stage in found)
        return [kept for stage in groups if (kept := [group for group in stage if group])]

    def scaled(
        self, scale: Scaling, layer: Layer, stages: list[list[Group]], token_weights: Weights
    ) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
        """Scale the layer's channels: exponents by linear, and what else of it has changed, by its name in the files.

        Scales are judged by weights and inputs as they come: where inputs are rounded, `scale` does it itself.
        """
        streams = [replace(stream, rounded=frozenset()) for stream in self.quantized]
        found = scale(
            layer.module,
            layer.index,
            self.source.family,
            stages,
            streams,
            token_weights,
            lambda linear: self.formats.get(layer.full(linear)),
            lambda inner: self.source.stored_dtype(layer.full(inner)),
        )
        tensors = {}
        for inner, value in found.changed.items():
            tensor = self.source.places[layer.full(inner)].tensor
            tensors[tensor] = value.to(DTYPES[self.source.headers[tensor].dtype])
        return found.ratios, tensors

    def solve(self, layer: Layer, stage: list[Group], token_weights: Weights) -> Iterator[tuple[str, Solution]]:
        """Solve a stage and put the results in their places, rounded as they will be served."""
        found: dict[str, Solution] = {}
        if self.settings.row.solves:
            problems = find_problems(
                layer.module,
                stage,
                token_weights,
                self._base(stage),
                lambda linear: self.formats[layer.full(linear)],
                lambda linear: self._dtype(layer, linear),
                self.device,
            )
            collect(problems, layer.module, layer.index, self.quantized, self.full, layer.originals)
            solutions = solve_all(problems, layer.module, self.solver, self.ranks)
            for problem, solution in zip(problems, solutions, strict=True):
                found |= dict(zip(problem.linears, solution.split(problem.rows), strict=True))
        else:
            found = {linear: Solution(self._nearest(layer, linear), None, None, 0) for (linear,) in stage}
        for linear, solution in found.items():
            if self.settings.sequential:
                put(layer.module, linear, solution.weight.served())
            yield linear, solution

    def _base(self, stage: list[Group]) -> str:
        """The two streams send different tokens to an expert: there is no residual between them."""
        return self.settings.base if len(stage) == 1 and self.settings.residual else "gptq"

    def _dtype(self, layer: Layer, linear: str) -> torch.dtype:
        """Of the weight in the source, which the scales get."""
        return self.source.stored_dtype(f"{layer.full(linear)}.weight")

    def _nearest(self, layer: Layer, linear: str) -> QuantizedWeight:
        """A linear's weight rounded to nearest."""
        weight, name = linear_of(layer.module, linear).weight, layer.full(linear)
        if self.learnt:
            return self.learnt(name, weight)
        return round_to_nearest(weight, self.formats[name], self._dtype(layer, linear), grid_of(self.settings))
