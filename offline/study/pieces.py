"""Every linear of the study at every width, solved once and kept on disk.

Second moments are collected on the full-precision stream, once per layer, and serve all widths. So a linear's rounding
depends on no other linear's width and any configuration can be put together from pieces. (A checkpoint that `vlmq
quantize` writes is better: there every layer also answers for the errors before it.)

One file per method, width and unit, `METHOD-BITS/UNIT.safetensors`, with the tensors of a checkpoint by their names in
the files; written aside and renamed, so that a file is there whole or not at all.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.offline.gptq import Solver, round_to_nearest, solve
from vlmq_vllm.offline.problems import Problem, collect, find_problems
from vlmq_vllm.offline.settings import Settings
from vlmq_vllm.offline.source import Source
from vlmq_vllm.offline.stages import find_stages
from vlmq_vllm.offline.stream import Stream, capture
from vlmq_vllm.offline.study.parts import Subject
from vlmq_vllm.offline.units import Target, Unit
from vlmq_vllm.offline.walk import GRIDS

Kind = tuple[str, int]  # method, width


class Pieces:
    """The files under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, kind: Kind, unit: Unit) -> Path:
        method, bits = kind
        return self.folder / f"{method}-{bits}" / f"{unit.key}.safetensors"

    def write(self, kind: Kind, unit: Unit, weights: dict[str, QuantizedWeight]) -> None:
        """Keep a unit's linears, by their names in the files."""
        path = self.file(kind, unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        tensors = {f"{name}.{part}": t for name, weight in weights.items() for part, t in weight.tensors().items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)

    def read(self, kind: Kind, unit: Unit, target: Target) -> torch.Tensor:
        """The weight [O, I] of a linear as it would be served, in the dtype of its scales."""
        with safe_open(self.file(kind, unit), "pt") as file:
            names = set(file.keys())
            found = {part: file.get_tensor(name) for part in PARTS if (name := f"{target.module}.{part}") in names}
        weight = QuantizedWeight.from_tensors(replace(target.format, bits=kind[1]), found)
        return weight.dequantize(weight.scale.dtype)


class PieceMaker:
    """Walks through the units and writes the pieces that are missing.

    settings: by method and width, of one solver and group size. stop: asked between units.
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
    def run(self, batches: list[dict]) -> None:
        """Write what is missing; `batches` as in a quantisation run. Raises QuantizeError and StoppedError."""
        for component in self.subject.components:
            units = [unit for unit in self.subject.units if unit.component == component]
            behind = [i for i, unit in enumerate(units) if self.missing(unit)]
            if behind:
                self._component(component, units[: behind[-1] + 1], batches)

    def _component(self, component: str, units: list[Unit], batches: list[dict]) -> None:
        solving = any(method != "rtn" for unit in units for method, _ in self.missing(unit))
        family = self.source.family
        stack = {"vision": family.blocks, "language": family.layers}.get(component)
        streams = self._streams(stack, batches) if solving and stack else []
        for number, unit in enumerate(units):
            if self.stop():
                raise StoppedError(f"stopped before {unit.module}; add --resume to the same command to go on")
            if solving and not stack:  # a connector: not a stack, every one gets its inputs from the tower
                streams = self._streams(unit.module, batches)
            index = unit.index if stack else 0
            missing = self.missing(unit)
            if missing or streams:
                layer = self.source.materialise(unit.module, self.device)
                self._unit(layer, unit, index, missing, streams)
                if stack and number + 1 < len(units):
                    for stream in streams:
                        stream.hidden = stream.run(layer, index)
                self.source.release(unit.module)
            if missing:
                self.say(f"{unit.module}: {', '.join(f'{method} at {bits} bits' for method, bits in missing)}")

    def _streams(self, stack: str, batches: list[dict]) -> list[Stream]:
        found = [stream for stream in capture(self.source, stack, batches, self.device) if stream]
        if not found:
            raise QuantizeError("no calibration sample reaches a part of the model that is studied; add pictures")
        return found

    def _unit(self, layer, unit: Unit, index: int, missing: list[Kind], streams: list[Stream]) -> None:
        own = [name.removeprefix(f"{unit.module}.") for name in self.targets if name.startswith(f"{unit.module}.")]
        found: dict[Kind, dict[str, QuantizedWeight]] = {kind: {} for kind in missing}
        solved = [kind for kind in missing if kind[0] != "rtn"]
        for kind in missing:
            if kind not in solved:
                for linear in own:
                    weight = layer.get_submodule(linear).weight
                    search = GRIDS[self.settings[kind].grid]
                    target = self._target(unit, linear)
                    rounded = round_to_nearest(weight, self._format(target, kind), self._dtype(target), search)
                    found[kind][target.module] = rounded
        if solved:
            for stage in find_stages(layer, index, streams[0]):
                groups = [tuple(linear for linear in group if linear in own) for group in stage]
                self._stage(layer, unit, index, [group for group in groups if group], streams, solved, found)
        for kind, weights in found.items():
            self.pieces.write(kind, unit, weights)

    def _stage(self, layer, unit, index, stage, streams, kinds, found) -> None:
        """Collect a stage's moments once and solve it for every width."""
        if not stage:
            return
        target_of = {linear: self._target(unit, linear) for group in stage for linear in group}
        problems = find_problems(
            layer, stage, {}, "gptq", lambda n: target_of[n].format, lambda n: self._dtype(target_of[n]), self.device
        )
        collect(problems, layer, index, streams, [], {})
        for problem in problems:
            h, _ = problem.moments.mean()
            weight = problem.stacked(layer)
            for kind in kinds:
                for linear, part in zip(problem.linears, self._solve(problem, weight, h, kind), strict=True):
                    found[kind][target_of[linear].module] = part
            problem.moments = None  # before the next one is solved

    def _solve(self, problem: Problem, weight: torch.Tensor, h: torch.Tensor, kind: Kind) -> list[QuantizedWeight]:
        options = self.settings[kind]
        solver = Solver(GRIDS[options.grid], options.act_order == "static", options.damp)
        [solution] = solve(weight[None], h[None], replace(problem.format, bits=kind[1]), problem.dtype, solver)
        if solution.damp is None:
            self.say(f"{problem.linears[0]} was rounded to nearest: its moments stayed singular under damping")
        return [part.weight for part in solution.split(problem.rows)]

    def _target(self, unit: Unit, linear: str) -> Target:
        return self.targets[f"{unit.module}.{linear}"]

    def _format(self, target: Target, kind: Kind):
        return replace(target.format, bits=kind[1])

    def _dtype(self, target: Target) -> torch.dtype:
        return self.source.stored_dtype(f"{target.name}.weight")
