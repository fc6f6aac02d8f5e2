"""Searches and rounds a stack with Q-VLM as the paper has it, weights and activations, in floating point.

Nothing of this is written or served.

A layer's parameter is the percentile p in {1, .995, .99, .985, .98} (2410.08119, section 4.1) that all activation
ranges of its linears share; weights have as many bits, rounded to nearest on searched ranges with one group per row.
The blocks, and the search in them, are those of `offline/methods/qvlm/block_quantizer.py`. `percentiles` (1.0,) is
plain rounding on the whole range.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.qvlm_fake.fake import (
    PERCENTILES,
    Rounder,
    by_channel,
    by_token,
    channel_percentiles,
    fake,
    rounding,
    row_ranges,
)
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.qvlm.blocks import (
    DEPTH,
    BlockChoice,
    Hidden,
    find_blocks,
    measure_entropies,
    search_block,
)
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import put, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream


@dataclass
class RoundedStack:
    """A rounded stack. weights: [O, I] float32, and rounders: of inputs, by the linear's in-memory name. blocks and
    choices (of percentiles, by number) as searched; shares: the percentile of each layer."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    rounders: dict[str, Rounder] = field(default_factory=dict)
    blocks: list[range] = field(default_factory=list)
    choices: list[BlockChoice] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


@torch.no_grad()
def search_stack(
    source: Source,
    names: Sequence[str],
    bits: int,
    per_token: bool,
    quantized: list[Stream],
    full: list[Stream],
    device: torch.device,
    depth: int = DEPTH,
    percentiles: Sequence[float] = PERCENTILES,
) -> RoundedStack:
    """Round the layers `names`; the streams move past the last. per_token: ranges as in the vision encoder.

    Raises QuantizeError for a linear that no token reaches (an expert, say), unless its ranges are per token.
    """
    ranks, found = Ranks(device), RoundedStack()
    entropies = measure_entropies(source, names, full, bits, ranks, device) if depth > 1 else [0.0] * (len(names) - 1)
    found.blocks = find_blocks(entropies, depth)
    for block in found.blocks:
        layers = [_FakeLayer(source, names[k], k, bits, per_token, percentiles, quantized, full, device) for k in block]
        state = [stream.hidden for stream in quantized]
        choice = search_block(layers, state, len(percentiles), ranks, device)
        found.choices.append(choice)
        for layer, number in zip(layers, choice.joint, strict=True):
            layer.hold(number)
            state = layer.run(state)
            found.weights |= {f"{layer.name}.{linear}": weight for linear, weight in layer.weights.items()}
            found.rounders |= {f"{layer.name}.{linear}": one for linear, one in layer.rounders[number].items()}
            found.shares.append(percentiles[number])
            source.release(layer.name)
        for stream, hidden in zip(quantized, state, strict=True):
            stream.hidden = hidden
    return found


class _FakeLayer:
    """A layer of a block while it is searched."""

    def __init__(self, source, name, index, bits, per_token, percentiles, quantized, full, device) -> None:
        self.name, self.index, self.percentiles, self.per_token = name, index, percentiles, per_token
        self.levels, self.quantized, self.full, self.held = 1 << bits, quantized, full, 0
        self.module = source.materialise(name, device)
        self.weights = {
            linear: fake(weight, *row_ranges(weight, 1 << bits), 1 << bits)
            for linear, weight in weights_of(self.module).items()
        }
        self.rounders: list[dict[str, Rounder]] = []

    def full_outputs(self) -> Hidden:
        inputs: dict[str, Hidden] = {linear: [] for linear in self.weights}
        handles = [
            self.module.get_submodule(linear).register_forward_pre_hook(lambda m, args, to=to: to.append(args[0]))
            for linear, to in inputs.items()
            if not self.per_token
        ]
        with removing(handles):
            for stream in self.full:
                stream.hidden = stream.run(self.module, self.index)
        if self.per_token:
            self.rounders = [dict.fromkeys(inputs, by_token(share, self.levels)) for share in self.percentiles]
        else:
            self._fix(inputs)
        for linear, weight in self.weights.items():
            put(self.module, linear, weight)
        return [stream.hidden for stream in self.full]

    def hold(self, candidate: int) -> None:
        self.held = candidate

    def run(self, state: Hidden) -> Hidden:
        pairs = zip(self.quantized, state, strict=True)
        with removing(rounding(self.module, self.rounders[self.held])):
            return [replace(stream, hidden=hidden).run(self.module, self.index) for stream, hidden in pairs]

    def _fix(self, inputs: dict[str, Hidden]) -> None:
        """The rounders of every candidate, from the full-precision inputs."""
        for linear, seen in inputs.items():
            if not any(part.numel() for part in seen):
                raise QuantizeError(
                    f"no calibration token reaches {self.name}.{linear}, so that its inputs have no range; "
                    "give more samples"
                )
        ranges = {linear: channel_percentiles(seen, self.percentiles) for linear, seen in inputs.items()}
        self.rounders = [
            {linear: by_channel(found[c], self.levels) for linear, found in ranges.items()}
            for c in range(len(self.percentiles))
        ]
