"""The walk in front of each part of a model: which streams a method needs there, and what weighs tokens and scales
channels on the way.
"""

from dataclasses import dataclass, replace

import torch

from vlmq_vllm.activations import round_tokens
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.data.calibration import Samples
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.choose import grid_of
from vlmq_vllm.offline.methods.qvlm.block_quantizer import BlockWalk
from vlmq_vllm.offline.methods.qvlm.tower_quantizer import TowerWalk
from vlmq_vllm.offline.methods.saliency.modality import Modality, modality_ratios
from vlmq_vllm.offline.methods.saliency.qig import Integrated
from vlmq_vllm.offline.methods.saliency.vlmq import Weighing
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream, capture
from vlmq_vllm.offline.model.targets import Unit
from vlmq_vllm.offline.run.layer_quantizer import Walk
from vlmq_vllm.offline.settings.quantize import KEPT, Settings

AnyWalk = Walk | BlockWalk | TowerWalk


@dataclass
class Walks:
    """What all walks of a run share. formats: of the linears that are quantised, by their in-memory names."""

    source: Source
    settings: Settings
    formats: dict[str, WeightFormat]
    device: torch.device
    ranks: Ranks
    samples: Samples

    def begin(self, component: str, stack: str, units: list[Unit], moved: bool) -> AnyWalk:
        """The walk in front of `stack`, whose modules are `units`. moved: what comes before it has been quantised."""
        shared = self.source, self.settings, self.formats, self.device, self.ranks
        if self.settings.row.joint:
            return self._jointly(component, stack, [unit.module for unit in units], moved)
        quantized, full = self._streams(component, stack, moved)
        weigh = scale = None
        if component == "language" and quantized:
            weigh, scale = self._weighing(full or quantized), self._scaling()
        return Walk(*shared, quantized, full, weigh, scale)

    def _jointly(self, component: str, stack: str, names: list[str], moved: bool) -> AnyWalk:
        """Q-VLM's walks: the tower's bounds are learnt, the decoder's searched; a connector is rounded to nearest."""
        shared = self.source, names, self.formats.get, self.device, self.ranks
        if component == "vision":
            return TowerWalk(*shared, self.samples.batches, self.samples.labels, grid_of(self.settings))
        if component == "connector":
            return Walk(self.source, self.settings, self.formats, self.device, self.ranks, [], [])
        return BlockWalk(*shared, *self._streams(component, stack, moved), grid_of(self.settings))

    def _streams(self, component: str, stack: str, moved: bool) -> tuple[list[Stream], list[Stream]]:
        """U behind all that has been quantised before the stack, and where a method needs it F behind originals."""
        batches, options = self.samples.batches, self.settings
        if not batches:
            return [], []
        rounded = frozenset()
        if options.activation_bits != KEPT:
            rounded = frozenset(map(self.source.model.get_submodule, self.formats))
        moved = moved or bool(rounded)
        paired = options.paired if component == "language" else options.residual
        quantized = capture(self.source, stack, batches, self.device, quantized=moved, rounded=rounded)
        full: list[Stream | None] = []
        if paired and moved:
            full = capture(self.source, stack, batches, self.device)
        elif paired:
            full = [stream and replace(stream) for stream in quantized]
        return [stream for stream in quantized if stream], [stream for stream in full if stream]

    def _weighing(self, streams: list[Stream]) -> Weighing | Integrated | Modality | None:
        """What weighs the decoder's tokens. streams: in front of its first layer."""
        options, source = self.settings, self.source
        if options.saliency == "vlmq":
            return Weighing(source.family, options, self.ranks)
        if options.saliency == "qig":
            return Integrated(self.ranks, None if options.activation_bits == KEPT else round_tokens)
        if options.saliency == "modality":
            labels, kinds = self.samples.labels, self.samples.kinds
            streams = [replace(stream, rounded=frozenset()) for stream in streams]
            ratios = modality_ratios(source, streams, labels, kinds, self.device, self.ranks)
            return Modality(source.family, ratios, kinds)
        return None

    def _scaling(self) -> Scaling | None:
        """What scales the decoder's channels."""
        options = self.settings
        if not options.row.scales_channels:
            return None
        inputs = None if options.activation_bits == KEPT else round_tokens
        return Scaling(grid_of(options), self.ranks, options.scale_loss, inputs)
