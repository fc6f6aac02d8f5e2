"""Quantises a stack of layers with Q-VLM, block by block (2410.08119).

In a block (`blocks.py`) every layer has one factor on the clipping ranges of its weights (`ranges.py`), which are then
rounded to nearest. What the paper leaves open: a "layer" is a layer of the decoder, and D is measured once, before
anything is quantised.

In memory at a time: a block's layers in float32 and once more with rounded weights, and hidden states of the whole
data after each of them. A block of which some layers were written before a run was stopped is searched once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.grid import MSE, GridSearch
from vlmq_vllm.offline.methods.qvlm.blocks import (
    BlockChoice,
    Hidden,
    find_blocks,
    measure_entropies,
    search_block,
)
from vlmq_vllm.offline.methods.qvlm.ranges import FACTORS, FormatOf, ranges_in
from vlmq_vllm.offline.methods.solution import Row
from vlmq_vllm.offline.model.layers import put, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

ENTROPY_BITS = 4  # the grid on which D is measured; the paper's lower width of activations
Tensors = dict[str, torch.Tensor]


@dataclass
class BlockQuantizer:
    """The streams before a stack whose layers have the in-memory names `names`, in order.

    quantized, full: U and F, one pair per batch. threshold: as in `find_blocks`. blocks: the partition; choices: what
    was searched, by the number of a block's first layer.
    """

    source: Source
    names: Sequence[str]
    format_of: FormatOf
    device: torch.device
    ranks: Ranks
    quantized: list[Stream]
    full: list[Stream]
    grid: GridSearch = MSE
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = self.source, self.names, self.full, ENTROPY_BITS, self.ranks, self.device
        self.blocks = find_blocks(measure_entropies(*given), threshold=self.threshold)
        self.choices: dict[int, BlockChoice] = {}
        self.passed = 0  # layers that the streams have passed
        self.results: dict[int, tuple[Tensors, list[Row]]] = {}

    @torch.no_grad()
    def layer(self, name: str, index: int, last: bool = False) -> tuple[Tensors, list[Row]]:
        """Layer `index`, quantised with its whole block: tensors by their names in the files, and report rows."""
        if index >= self.passed:
            block = self._block(index)
            self._solve(block, index, last or block.stop == len(self.names))
        return self.results.pop(index)

    @torch.no_grad()
    def replay(self, name: str, index: int) -> None:
        """Layer `index` has been quantised before. After a block's last layer the streams move past the block."""
        self.results.pop(index, None)
        block = self._block(index)
        if index < block.stop - 1 or self.passed >= block.stop:
            return
        for k in block:
            for streams, quantized in ((self.full, False), (self.quantized, True)):
                with self.source.loaded(self.names[k], self.device, quantized) as layer:
                    for stream in streams:
                        stream.hidden = stream.run(layer, k)
        self.passed = block.stop

    def _block(self, index: int) -> range:
        return next(block for block in self.blocks if index in block)

    def _solve(self, block: range, first: int, last: bool) -> None:
        """Search a block and keep the results of its layers from `first` on, as those before it have been written; the
        streams move past it."""
        layers = [_SearchedLayer(self, k) for k in block]
        start = [stream.hidden for stream in self.quantized]
        choice = search_block(layers, start, len(FACTORS), self.ranks, self.device)
        self.choices[block.start] = choice
        for layer, number in zip(layers, choice.joint, strict=True):
            if layer.index >= first:
                self.results[layer.index] = layer.result(FACTORS[number])
            if not last:
                layer.hold(number)
                start = layer.run(start)
            self.source.release(layer.name)
        for stream, hidden in zip(self.quantized, start, strict=True):
            stream.hidden = hidden
        self.passed = block.stop


class _SearchedLayer:
    """A SearchedLayer (`blocks.py`); `held` is the candidate its linears are rounded with at the moment."""

    def __init__(self, owner: BlockQuantizer, index: int) -> None:
        self.owner, self.index, self.name = owner, index, owner.names[index]
        self.module = owner.source.materialise(self.name, owner.device)
        self.originals = weights_of(self.module)
        self.ranges = ranges_in(owner.source, self.name, self.module, owner.format_of, owner.grid)
        self.held: int | None = None

    def full_outputs(self) -> Hidden:
        for stream in self.owner.full:
            stream.hidden = stream.run(self.module, self.index)
        return [stream.hidden for stream in self.owner.full]

    def hold(self, candidate: int) -> None:
        if candidate != self.held:
            for linear, weight in self._on_ranges(FACTORS[candidate]).items():
                put(self.module, linear, weight.served())
            self.held = candidate

    def run(self, state: Hidden) -> Hidden:
        pairs = zip(self.owner.quantized, state, strict=True)
        return [replace(stream, hidden=hidden).run(self.module, self.index) for stream, hidden in pairs]

    def result(self, factor: float) -> tuple[Tensors, list[Row]]:
        """Tensors by their names in the files, and report rows."""
        tensors: Tensors = {}
        rows = []
        for linear, weight in self._on_ranges(factor).items():
            module = self.owner.source.module_in_files(f"{self.name}.{linear}")
            tensors |= {f"{module}.{part}": tensor for part, tensor in weight.tensors().items()}
            rows.append(Row(module, None, None, 0, "equal", None))
        return tensors, rows

    def _on_ranges(self, factor: float) -> dict[str, QuantizedWeight]:
        return {linear: ranges.rounded(self.originals[linear], factor) for linear, ranges in self.ranges.items()}
