"""Chooses what quantises the decoder, tower or connector, and gives it activations, token weights and scaling."""

from dataclasses import dataclass, replace

import torch

from vlmq_vllm.activations import round_tokens
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.data.calibration import Samples
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.choose import grid_of
from vlmq_vllm.offline.methods.qvlm.block_quantizer import BlockQuantizer
from vlmq_vllm.offline.methods.qvlm.tower import learn_tower
from vlmq_vllm.offline.methods.saliency.modality import ModalityWeights, modality_ratios
from vlmq_vllm.offline.methods.saliency.qig import QIGWeights
from vlmq_vllm.offline.methods.saliency.vlmq import VLMQWeights
from vlmq_vllm.offline.methods.saliency.weigher import TokenWeigher
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.hooks import InputRounding
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.model.targets import Unit
from vlmq_vllm.offline.run.layer_quantizer import LayerQuantizer
from vlmq_vllm.offline.settings.quantize import KEPT, Settings


@dataclass
class Quantizers:
    """What all quantisers of a run share. formats: of the linears that are quantised, by their in-memory names."""

    source: Source
    settings: Settings
    formats: dict[str, WeightFormat]
    device: torch.device
    ranks: Ranks
    samples: Samples

    def begin(self, component: str, units: list[Unit], moved: bool) -> LayerQuantizer | BlockQuantizer:
        """The quantiser of units that run one after the other. moved: what comes before them has been quantised."""
        stack = {"vision": self.source.family.blocks, "language": self.source.family.layers}
        shared = self.source, self.settings, self.formats, self.device, self.ranks
        jointly = self.source, [unit.module for unit in units], self.formats.get, self.device, self.ranks
        grid, joint = grid_of(self.settings), self.settings.row.joint
        if joint and component == "vision":  # Q-VLM learns the tower's bounds and searches the decoder's
            learnt = learn_tower(*jointly, self.samples.batches, self.samples.labels, grid)
            return LayerQuantizer(*shared, [], [], learnt=learnt)
        if joint and component == "connector":  # rounded to nearest
            return LayerQuantizer(*shared, [], [])
        quantized, full = self._streams(component, stack.get(component, units[0].module), moved)
        if joint:
            return BlockQuantizer(*jointly, quantized, full, grid)
        weigh = scale = None
        if component == "language" and quantized:
            weigh = self._weigher(full or quantized)
            if self.settings.row.scales_channels:
                scale = Scaling(grid, self.ranks, self.settings.scale_loss, self._rounded_inputs())
        return LayerQuantizer(*shared, quantized, full, weigh, scale)

    def _streams(self, component: str, stack: str, moved: bool) -> tuple[list[Stream], list[Stream]]:
        """U after all that has been quantised before the stack, and where a method needs it F after originals."""
        batches, options = self.samples.batches, self.settings
        if not batches:
            return [], []
        rounded: frozenset[torch.nn.Module] = frozenset()
        if options.activation_bits != KEPT:
            rounded = frozenset(map(self.source.model.get_submodule, self.formats))
        moved = moved or bool(rounded)
        paired = options.paired if component == "language" else options.residual
        quantized = capture(self.source, stack, batches, self.device, quantized=moved, rounded=rounded)
        if paired and moved:
            return quantized, capture(self.source, stack, batches, self.device)
        return quantized, [replace(stream) for stream in quantized] if paired else []

    def _weigher(self, streams: list[Stream]) -> TokenWeigher | None:
        """What weighs the decoder's tokens. streams: before its first layer."""
        source, samples = self.source, self.samples
        match self.settings.saliency:
            case "vlmq":
                return VLMQWeights(source.family, self.settings, self.ranks)
            case "qig":
                return QIGWeights(self.ranks, self._rounded_inputs())
            case "modality":
                streams = [replace(stream, rounded=frozenset()) for stream in streams]
                ratios = modality_ratios(source, streams, samples.labels, samples.kinds, self.device, self.ranks)
                return ModalityWeights(source.family, ratios, samples.kinds)
        return None

    def _rounded_inputs(self) -> InputRounding | None:
        """What 8-bit activations do to what a linear reads."""
        return None if self.settings.activation_bits == KEPT else round_tokens
