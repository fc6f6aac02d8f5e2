"""Quantises every linear of a study, layer by layer, by each method and width that is missing.

Inputs are those of the full-precision stream, and for GPTQ Hessians are collected once per layer and serve all widths.
So a linear's rounding depends on no other linear's width, and any configuration can be put together from pieces. (A
checkpoint that `vlmq quantize` writes is better by GPTQ: there every layer also answers for the errors before it.)
AWQ's scales are searched for every width anew. With s the scales of a linear's columns and t those of its rows, where
the linear after it divides by them,

    W'[o, i] = W[o, i] s_i / t_o    is rounded to Q,    and the piece is    Q[o, i] W[o, i] / W'[o, i],

what the linear amounts to in a layer whose other parts are not folded.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.choose import grid_of, solver_of
from vlmq_vllm.offline.methods.gptq.problem import Problem
from vlmq_vllm.offline.methods.gptq.solve import solve
from vlmq_vllm.offline.model.capture import capture, check_replay
from vlmq_vllm.offline.model.layers import linear_of, with_parameters
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.model.targets import Unit
from vlmq_vllm.offline.run.layer_quantizer import LayerQuantizer
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.sweep.parts import Subject
from vlmq_vllm.offline.sweep.pieces import Kind, Pieces

Found = dict[str, QuantizedWeight | torch.Tensor]  # by the names in the files


class PieceMaker:
    """Walks through the units and writes the pieces that are missing.

    settings: by method and width, with one group size. stop: asked between units.
    """

    def __init__(
        self,
        source: Source,
        subject: Subject,
        settings: dict[Kind, Settings],
        pieces: Pieces,
        device: torch.device,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:
        self.source, self.subject, self.settings, self.pieces = source, subject, settings, pieces
        self.device, self.say, self.stop = device, say, stop
        self.targets, self.ranks = {target.name: target for target in subject.targets}, Ranks(device)

    def missing(self, unit: Unit) -> list[Kind]:
        """What has not been written of a unit."""
        return [kind for kind in self.settings if not self.pieces.file(kind, unit).is_file()]

    @torch.no_grad()
    def run(self, batches: list[dict], probe: dict | None) -> None:
        """Write what is missing; `batches` as in a quantisation run, `probe` a sample on which is proved that running
        layer by layer is the model's own forward. Raises QuantizeError and StoppedError."""
        if probe is not None and self._calibrates(self.subject.units):
            check_replay(self.source, probe, self.device)
        for component in self.subject.components:
            units = [unit for unit in self.subject.units if unit.component == component]
            wanting = [i for i, unit in enumerate(units) if self.missing(unit)]
            if wanting:
                self._component(component, units[: wanting[-1] + 1], batches)

    def _component(self, component: str, units: list[Unit], batches: list[dict]) -> None:
        calibrated = self._calibrates(units)
        family = self.source.family
        stack = {"vision": family.blocks, "language": family.layers}.get(component)
        streams = self._streams(stack, batches) if calibrated and stack else []
        for number, unit in enumerate(units):
            if self.stop():
                raise StoppedError(f"stopped before {unit.module}; add --resume to the same command to go on")
            if calibrated and not stack:  # a connector: not a stack, every one gets its inputs from the tower
                streams = self._streams(unit.module, batches)
            index, missing = unit.index if stack else 0, self.missing(unit)
            layer = self.source.materialise(unit.module, self.device)
            for kind, found in self._unit(layer, unit, index, missing, streams).items():
                self.pieces.write(kind, unit, found)
            if stack and number + 1 < len(units):
                for stream in streams:
                    stream.hidden = stream.run(layer, index)
            self.source.release(unit.module)
            if missing:
                self.say(f"{unit.module}: {', '.join(f'{method} at {bits} bits' for method, bits in missing)}")

    def _calibrates(self, units: list[Unit]) -> bool:
        """Whether anything is missing that needs the inputs of linears."""
        return any(self.settings[kind].row.calibrated for unit in units for kind in self.missing(unit))

    def _streams(self, stack: str, batches: list[dict]) -> list[Stream]:
        found = [stream for stream in capture(self.source, stack, batches, self.device) if stream]
        if not found:
            raise QuantizeError("no calibration sample reaches a part of the model that is studied; add pictures")
        return found

    def _unit(
        self, module: torch.nn.Module, unit: Unit, index: int, missing: list[Kind], streams: list[Stream]
    ) -> dict[Kind, Found]:
        """The pieces of a unit that are missing."""
        together = [kind for kind in missing if self.settings[kind].row.compensates]
        found = self._compensated(module, unit, index, together, streams) if together else {}
        for kind in missing:
            if kind not in together:
                found[kind] = self._round(module, unit, index, kind, streams)
        return found

    def _quantizer(self, kind: Kind, streams: list[Stream]) -> LayerQuantizer:
        formats = {name: replace(target.format, bits=kind[1]) for name, target in self.targets.items()}
        return LayerQuantizer(self.source, self.settings[kind], formats, self.device, self.ranks, streams, [])

    def _compensated(
        self, module: torch.nn.Module, unit: Unit, index: int, kinds: list[Kind], streams: list[Stream]
    ) -> dict[Kind, Found]:
        """All widths of methods that compensate, on Hessians that are summed stage by stage to bound their memory."""
        found: dict[Kind, Found] = {kind: {} for kind in kinds}
        quantizer = self._quantizer(kinds[0], streams)
        layer = quantizer.layer_of(module, unit.module, index)
        for stage in quantizer.stages(layer):
            problems = quantizer.problems(layer, stage, {})
            while problems:
                problem = problems.pop(0)  # its Hessian goes before the next one is solved
                h, _ = problem.moments.mean()
                for kind in kinds:
                    found[kind] |= self._solved(unit, problem, problem.stacked(module), h, kind)
        return found

    def _solved(self, unit: Unit, problem: Problem, weight: torch.Tensor, h: torch.Tensor, kind: Kind) -> Found:
        format = replace(problem.format, bits=kind[1])
        [solution] = solve(weight[None], h[None], format, problem.dtype, solver_of(self.settings[kind]))
        if solution.damp is None:
            name = f"{unit.module}.{problem.linears[0]}"
            self.say(f"{name} was rounded to nearest: its Hessian stayed singular under damping")
        parts = zip(problem.linears, solution.split(problem.rows), strict=True)
        return {self._in_files(unit, linear): part.weight for linear, part in parts}

    def _round(self, module: torch.nn.Module, unit: Unit, index: int, kind: Kind, streams: list[Stream]) -> Found:
        """One width of a method that rounds: AWQ scales channels in the decoder, and clips ranges everywhere."""
        options, quantizer = self.settings[kind], self._quantizer(kind, streams)
        layer, found = quantizer.layer_of(module, unit.module, index), Found()
        with with_parameters(module, layer.originals):
            stages = quantizer.stages(layer)
            if options.row.scales_channels and unit.component == "language":
                quantizer.scaled(Scaling(grid_of(options), self.ranks, options.scale_loss), layer, stages, {})
            for stage in stages:
                for linear, solution in quantizer.solve(layer, stage, {}):
                    weight: QuantizedWeight | torch.Tensor = solution.weight
                    if options.row.scales_channels:
                        folded = linear_of(module, linear).weight
                        weight = unfolded(solution.weight, layer.originals[f"{linear}.weight"], folded)
                    found[self._in_files(unit, linear)] = weight
        return found

    def _in_files(self, unit: Unit, linear: str) -> str:
        """Name of a linear in the files."""
        return self.targets[f"{unit.module}.{linear}"].module


def unfolded(rounded: QuantizedWeight, weight: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """What a rounded weight amounts to [O, I], in the dtype of its scales: `folded` [O, I] was rounded in the place of
    `weight`. A weight of zero is rounded to zero."""
    served = rounded.served()
    return torch.where(folded == 0, 0.0, served * (weight / folded)).to(rounded.scale.dtype)
