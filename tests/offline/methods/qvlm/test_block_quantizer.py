"""The walk by blocks on the demo model: what is searched, what is written, and that it goes on where it stopped."""

from dataclasses import replace

import pytest
import torch

from vlmq_vllm.format import PARTS, QuantizedWeight, WeightFormat
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.inputs import load_processor, model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.qvlm.block_quantizer import BlockQuantizer
from vlmq_vllm.offline.methods.qvlm.blocks import mean_square
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.layers import put, weights_of
from vlmq_vllm.offline.model.source import Source

FORMAT = WeightFormat(3, 64, False)
CPU = torch.device("cpu")
LINEARS = 7


@pytest.fixture(scope="module")
def streams(demo_model, calibration):
    source = Source(demo_model)
    chats = read_chats(calibration, 0)
    batches = batched([inputs for _, inputs in model_inputs(chats, load_processor(demo_model), 6, 2048)])
    return capture(source, source.family.layers, batches, CPU)


@pytest.fixture
def begin(demo_model, streams):
    """A walk at its beginning, of a source of its own; with a threshold of 0 every run of neighbours is a block."""

    def start(threshold=0.0, formats=lambda name: FORMAT) -> BlockQuantizer:
        source = Source(demo_model)
        names = [f"{source.family.layers}.{i}" for i in range(len(source.layers()))]
        both = [[replace(stream) for stream in streams] for _ in range(2)]
        return BlockQuantizer(source, names, formats, CPU, Ranks(CPU), *both, threshold=threshold)

    return start


def walked(walk: BlockQuantizer) -> list[dict[str, torch.Tensor]]:
    """The tensors of all layers."""
    last = len(walk.names) - 1
    return [walk.layer(name, i, i == last)[0] for i, name in enumerate(walk.names)]


def served(source, tensors: dict[str, torch.Tensor], format=FORMAT):
    """What `source.quantized` gives once these tensors are in the files."""

    def read(name: str) -> torch.Tensor | None:
        module = source.places[name].module
        found = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
        if not found:
            return None
        weight = QuantizedWeight.from_tensors(format, found)
        return weight.dequantize(weight.scale.dtype)

    return read


@torch.no_grad()
def error_after(walk: BlockQuantizer, streams, tensors, last: int) -> float:
    """Mean squared error after layer `last` with the written weights, run anew from the streams."""
    source, read = walk.source, served(walk.source, tensors)
    quantized, full = [[replace(stream) for stream in streams] for _ in range(2)]
    for k in range(last + 1):
        layer = source.materialise(walk.names[k], CPU)
        for stream in full:
            stream.hidden = stream.run(layer, k)
        for linear in weights_of(layer):
            put(layer, linear, read(f"{walk.names[k]}.{linear}.weight").float())
        for stream in quantized:
            stream.hidden = stream.run(layer, k)
        source.release(walk.names[k])
    found, wanted = [[stream.hidden for stream in group] for group in (quantized, full)]
    return mean_square(found, wanted, walk.ranks, CPU)


def test_joint_search_is_better_than_greedy_and_its_error_is_that_of_what_is_written(begin, streams):
    walk = begin()
    assert [(block.start, block.stop) for block in walk.blocks] == [(0, 3), (3, 4)]
    tensors = {name: t for found in walked(walk) for name, t in found.items()}
    assert len([name for name in tensors if name.endswith("weight_packed")]) == 4 * LINEARS
    choice = walk.choices[0]
    assert choice.error < choice.greedy_error and choice.joint != choice.greedy
    # the same sums in the same order on the same weights, but for the place where they are rounded
    assert error_after(walk, streams, tensors, 2) == pytest.approx(choice.error, rel=1e-6)
    assert error_after(walk, streams, tensors, 3) == pytest.approx(walk.choices[3].error, rel=1e-6)


def test_blocks_of_one_layer_are_greedy(begin):
    walk = begin(threshold=float("inf"))
    assert list(map(len, walk.blocks)) == [1] * 4
    walked(walk)
    assert all(
        choice.joint == choice.greedy and choice.error == choice.greedy_error for choice in walk.choices.values()
    )
    wide = begin()
    walked(wide)
    # greedy inside a block is what blocks of one layer do
    assert wide.choices[0].greedy == tuple(walk.choices[k].joint[0] for k in range(3))
    assert wide.choices[0].greedy_error == walk.choices[2].error


@pytest.mark.parametrize("written", [1, 2, 3])
def test_a_walk_that_goes_on_writes_the_same(begin, written):
    """After one and two layers of the first block, and after the whole of it."""
    expected = walked(begin())
    walk = begin()
    done = {name: t for found in expected[:written] for name, t in found.items()}
    walk.source.quantized = served(walk.source, done)
    for k in range(written):
        walk.replay(walk.names[k], k)
    for k in range(written, 4):
        found, _ = walk.layer(walk.names[k], k, k == 3)
        assert found.keys() == expected[k].keys()
        assert all(torch.equal(found[name], expected[k][name]) for name in found)
    assert not walk.results  # what had been written before is not kept


def test_linears_without_a_format_stay_as_they_are(begin):
    eight = WeightFormat(8, -1, True)

    def formats(name):
        return None if "down_proj" in name else eight if "q_proj" in name else FORMAT

    walk = begin(formats=formats)
    tensors, rows = walk.layer(walk.names[0], 0)
    assert len(rows) == LINEARS - 1 and not any("down_proj" in name for name in tensors)
    (packed,) = [name for name in tensors if "q_proj" in name and name.endswith("packed")]
    assert tensors[packed].shape == (256, 256 * 8 // 32)
    assert [row.loss for row in rows] == [None] * 6
