"""The pieces of a study are made: layer by layer, for every method and width that is missing.

Inputs are those of the full-precision stream, and for GPTQ second moments are collected once per layer and serve all
widths. So a linear's rounding depends on no other linear's width, and any configuration can be put together from
pieces. (A checkpoint that `vlmq quantize` writes is better by GPTQ: there every layer also answers for the errors
before it.) AWQ's scales are searched for every width anew. With s the scales of a linear's columns and t those of its
rows, where the linear behind it divides by them,

    W'[o, i] = W[o, i] s_i / t_o    is rounded to Q,    and the piece is    Q[o, i] W[o, i] / W'[o, i],

what the linear amounts to in a layer whose other parts are not folded.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.choose import grid_of, solver_of
from vlmq_vllm.offline.methods.gptq.problem import Problem, collect, find_problems, solve_all
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest, solve
from vlmq_vllm.offline.model.capture import capture, check_replay
from vlmq_vllm.offline.model.groups import Group, find_stages
from vlmq_vllm.offline.model.layers import parameters_of, with_parameters
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.model.targets import Target, Unit
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
        self.targets = {target.name: target for target in subject.targets}

    def missing(self, unit: Unit) -> list[Kind]:
        """What has not been written of a unit."""
        return [kind for kind in self.settings if not self.pieces.file(kind, unit).is_file()]

    @torch.no_grad()
    def run(self, batches: list[dict], probe: dict | None) -> None:
        """Write what is missing; `batches` as in a quantisation run, `probe` a sample on which is proved that running
        layer by layer is the model's own forward. Raises QuantizeError and StoppedError."""
        if probe is not None and self._walks(self.subject.units):
            check_replay(self.source, probe, self.device)
        for component in self.subject.components:
            units = [unit for unit in self.subject.units if unit.component == component]
            behind = [i for i, unit in enumerate(units) if self.missing(unit)]
            if behind:
                self._component(component, units[: behind[-1] + 1], batches)

    def _component(self, component: str, units: list[Unit], batches: list[dict]) -> None:
        calibrated = self._walks(units)
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

    def _walks(self, units: list[Unit]) -> bool:
        """Whether anything is missing that needs the inputs of linears."""
        return any(method != "rtn" for unit in units for method, _ in self.missing(unit))

    def _streams(self, stack: str, batches: list[dict]) -> list[Stream]:
        found = [stream for stream in capture(self.source, stack, batches, self.device) if stream]
        if not found:
            raise QuantizeError("no calibration sample reaches a part of the model that is studied; add pictures")
        return found

    def _unit(self, layer, unit: Unit, index: int, missing: list[Kind], streams: list[Stream]) -> dict[Kind, Found]:
        """The pieces of a unit that are missing."""
        of = {name: [kind for kind in missing if kind[0] == name] for name in ("rtn", "gptq", "awq")}
        found = {kind: self._rounded(layer, unit, kind) for kind in of["rtn"]}
        if of["gptq"] or of["awq"]:
            stages = self._stages(layer, unit, index, streams[0])
            found |= self._compensated(layer, unit, index, stages, of["gptq"], streams) if of["gptq"] else {}
            for kind in of["awq"]:
                found[kind] = self._scaled(layer, unit, index, stages, kind, streams)
        return found

    def _stages(self, layer, unit: Unit, index: int, stream: Stream) -> list[list[Group]]:
        """Of the study's linears."""
        groups = [
            [tuple(linear for linear in group if f"{unit.module}.{linear}" in self.targets) for group in stage]
            for stage in find_stages(layer, index, stream)
        ]
        return [kept for stage in groups if (kept := [group for group in stage if group])]

    def _rounded(self, layer, unit: Unit, kind: Kind) -> Found:
        found = {}
        for target in self.targets.values():
            if target.name.startswith(f"{unit.module}."):
                weight = layer.get_submodule(target.name.removeprefix(f"{unit.module}.")).weight
                search = grid_of(self.settings[kind])
                found[target.module] = round_to_nearest(weight, _format(target, kind), self._dtype(target), search)
        return found

    def _compensated(self, layer, unit, index, stages, kinds: list[Kind], streams) -> dict[Kind, Found]:
        """GPTQ at every width, on moments that are collected stage by stage to bound their memory."""
        found: dict[Kind, Found] = {kind: {} for kind in kinds}
        for stage in stages:
            problems = self._problems(layer, unit, stage, kinds[0])
            collect(problems, layer, index, streams, [], {})
            for problem in problems:
                h, _ = problem.moments.mean()
                for kind in kinds:
                    found[kind] |= self._solved(unit, problem, problem.stacked(layer), h, kind)
                problem.moments = None  # before the next one is solved
        return found

    def _solved(self, unit: Unit, problem: Problem, weight: torch.Tensor, h: torch.Tensor, kind: Kind) -> Found:
        format = replace(problem.format, bits=kind[1])
        [solution] = solve(weight[None], h[None], format, problem.dtype, solver_of(self.settings[kind]))
        if solution.damp is None:
            self.say(
                f"{unit.module}.{problem.linears[0]} was rounded to nearest: its moments stayed singular under damping"
            )
        parts = zip(problem.linears, solution.split(problem.rows), strict=True)
        return {self._target(unit, linear).module: part.weight for linear, part in parts}

    def _scaled(self, layer, unit: Unit, index: int, stages, kind: Kind, streams: list[Stream]) -> Found:
        """AWQ at one width: scales in the decoder, clipped ranges everywhere."""
        options, ranks = self.settings[kind], Ranks(self.device)
        originals, found = parameters_of(layer), {}
        with with_parameters(layer, originals):
            if unit.component == "language":
                Scaling(grid_of(options), ranks, options.scale_loss)(
                    layer, index, stages, streams, {}, self._format_of(unit, kind), self._dtype_of(unit)
                )
            for stage in stages:
                problems = self._problems(layer, unit, stage, kind)
                collect(problems, layer, index, streams, [], {})
                solutions = solve_all(problems, layer, solver_of(options), ranks)
                for problem, solution in zip(problems, solutions, strict=True):
                    for linear, part in zip(problem.linears, solution.split(problem.rows), strict=True):
                        folded = layer.get_submodule(linear).weight
                        weight = unfolded(part.weight, originals[f"{linear}.weight"], folded)
                        found[self._target(unit, linear).module] = weight
        return found

    def _problems(self, layer, unit: Unit, stage: list[Group], kind: Kind) -> list[Problem]:
        dtype_of = self._dtype_of(unit)
        formats = self._format_of(unit, kind)
        return find_problems(layer, stage, {}, "gptq", formats, lambda n: dtype_of(f"{n}.weight"), self.device)

    def _format_of(self, unit: Unit, kind: Kind) -> Callable[[str], WeightFormat | None]:
        def format_of(linear: str) -> WeightFormat | None:
            target = self.targets.get(f"{unit.module}.{linear}")
            return target and _format(target, kind)

        return format_of

    def _dtype_of(self, unit: Unit) -> Callable[[str], torch.dtype]:
        return lambda inner: self.source.stored_dtype(f"{unit.module}.{inner}")

    def _target(self, unit: Unit, linear: str) -> Target:
        return self.targets[f"{unit.module}.{linear}"]

    def _dtype(self, target: Target) -> torch.dtype:
        return self.source.stored_dtype(f"{target.name}.weight")


def unfolded(rounded: QuantizedWeight, weight: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """What a rounded weight amounts to [O, I], in the dtype of its scales: `folded` [O, I] was rounded in the place of
    `weight`. A weight of zero is rounded to zero."""
    served = rounded.served()
    return torch.where(folded == 0, 0.0, served * (weight / folded)).to(rounded.scale.dtype)


def _format(target: Target, kind: Kind) -> WeightFormat:
    return replace(target.format, bits=kind[1])
