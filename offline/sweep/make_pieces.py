"""Quantises every linear of a study, layer by layer, by each method and width that is missing.

Inputs are those of the full-precision stream. So a linear's rounding depends on no other linear's width, and any
configuration can be put together from pieces. (A checkpoint that `vlmq quantize` writes is better by GPTQ: there every
layer also answers for the errors before it.) With s AWQ's scales of a linear's columns and t those of its rows, where
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
from vlmq_vllm.offline.methods.choose import grid_of
from vlmq_vllm.offline.model.capture import capture, check_replay
from vlmq_vllm.offline.model.layers import linear_of, with_parameters
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.model.targets import Unit
from vlmq_vllm.offline.run.layer_quantizer import LayerQuantizer
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.sweep.parts import Subject
from vlmq_vllm.offline.sweep.pieces import Kind, Pieces


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
        self.ranks = Ranks(device)

    def missing(self, unit: Unit) -> list[Kind]:
        """What has not been written of a unit."""
        return [kind for kind in self.settings if not self.pieces.file(kind, unit).is_file()]

    @torch.no_grad()
    def run(self, batches: list[dict], probe: dict | None) -> None:
        """Write what is missing; `batches` as in a quantisation run, `probe` a sample on which is proved that running
        layer by layer is the model's own forward. Raises QuantizeError and StoppedError."""
        if probe is not None and self._calibrates(self.subject.units):
            check_replay(self.source, probe, self.device)
        stacks: dict[str, list[Unit]] = {}
        for unit in self.subject.units:
            if unit.component == "connector":  # not a stack: every one gets its inputs from the tower
                stacks[unit.module] = [replace(unit, index=0)]
            else:
                stacks.setdefault(unit.module.rpartition(".")[0], []).append(unit)
        for stack, units in stacks.items():
            wanting = [i for i, unit in enumerate(units) if self.missing(unit)]
            if wanting:
                self._walk(stack, units[: wanting[-1] + 1], batches)

    def _walk(self, stack: str, units: list[Unit], batches: list[dict]) -> None:
        streams: list[Stream] = []
        if self._calibrates(units):
            streams = capture(self.source, stack, batches, self.device)
            if not streams:
                raise QuantizeError("no calibration sample reaches a part of the model that is studied; add pictures")
        for unit in units:
            if self.stop():
                raise StoppedError(f"stopped before {unit.module}; add --resume to the same command to go on")
            module = self.source.materialise(unit.module, self.device)
            for kind in (missing := self.missing(unit)):
                self.pieces.write(kind, unit, self._round(module, unit, kind, streams))
            if unit is not units[-1]:
                for stream in streams:
                    stream.hidden = stream.run(module, unit.index)
            self.source.release(unit.module)
            if missing:
                self.say(f"{unit.module}: {', '.join(f'{method} at {bits} bits' for method, bits in missing)}")

    def _calibrates(self, units: list[Unit]) -> bool:
        """Whether anything is missing that needs the inputs of linears."""
        return any(self.settings[kind].row.calibrated for unit in units for kind in self.missing(unit))

    def _round(
        self, module: torch.nn.Module, unit: Unit, kind: Kind, streams: list[Stream]
    ) -> dict[str, QuantizedWeight | torch.Tensor]:
        """A unit's linears by one method at one width, by their names in the files. AWQ scales channels in the decoder,
        and clips ranges everywhere."""
        options = self.settings[kind]
        found: dict[str, QuantizedWeight | torch.Tensor] = {}
        formats = {target.name: replace(target.format, bits=kind[1]) for target in self.subject.targets}
        quantizer = LayerQuantizer(self.source, options, formats, self.device, self.ranks, streams, [])
        layer = quantizer.layer_of(module, unit.module, unit.index)
        with with_parameters(module, layer.originals):
            stages = quantizer.stages(layer)
            if options.row.scales_channels and unit.component == "language":
                quantizer.scaled(Scaling(grid_of(options), self.ranks, options.scale_loss), layer, stages, {})
            for linear, solution in (each for stage in stages for each in quantizer.solve(layer, stage, {})):
                name = layer.full(linear)
                if options.row.compensates and solution.damp is None:
                    self.say(f"{name} was rounded to nearest: its Hessian stayed singular under damping")
                weight: QuantizedWeight | torch.Tensor = solution.weight
                if options.row.scales_channels:
                    folded = linear_of(module, linear).weight
                    weight = unfolded(solution.weight, layer.originals[f"{linear}.weight"], folded)
                found[self.source.module_in_files(name)] = weight
        return found


def unfolded(rounded: QuantizedWeight, weight: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """What a rounded weight amounts to [O, I], in the dtype of its scales: `folded` [O, I] was rounded in the place of
    `weight`. A weight of zero is rounded to zero."""
    served = rounded.served()
    return torch.where(folded == 0, 0.0, served * (weight / folded)).to(rounded.scale.dtype)
