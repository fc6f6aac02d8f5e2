"""Batches of calibration samples: nothing is padded, and no sample changes how the tokens of another weigh."""

import functools
import shutil
from collections import Counter

import pytest
import torch

from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.calibration import read_samples
from vlmq_vllm.offline.machine.progress import Progress
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.qig import QIGWeights
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.layers import holding, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.quantize import Settings

CPU = torch.device("cpu")


def sample(length, patches):
    ids = torch.randint(1, 1 << 30, (1, length))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"pixel_values": torch.randn(patches, 6)} if patches else {})


@pytest.mark.parametrize("limit", [1, 14, 2048])
@pytest.mark.parametrize(
    "sizes", [[(5, 4)], [(5, 4), (7, 4), (5, 8), (6, 0), (5, 0), (5, 4)], [(n % 3 + 4, n % 2) for n in range(9)]]
)
def test_no_batch_holds_padding(sizes, limit):
    samples = [sample(*size) for size in sizes]
    batches = batched(samples, limit)
    rows = [row for batch in batches for row in batch["input_ids"]]
    assert Counter(tuple(row.tolist()) for row in rows) == Counter(tuple(s["input_ids"][0].tolist()) for s in samples)
    assert all((batch["attention_mask"] == 1).all() for batch in batches)
    assert all(batch["input_ids"].numel() <= limit or len(batch["input_ids"]) == 1 for batch in batches)
    for batch in batches:
        held = [next(s for s in samples if torch.equal(s["input_ids"][0], row)) for row in batch["input_ids"]]
        for name, value in batch.items():
            assert torch.equal(value, torch.cat([s[name] for s in held])), name


def test_a_samples_token_weights_do_not_depend_on_the_others(demo_model, calibration, tmp_path):
    """Samples of several lengths, some of them in one batch, against each as the only one of a run."""
    source = Source(demo_model)
    settings = Settings(bits=3, group_size=64, method="gptq", saliency="qig")
    shutil.copytree(calibration.parent, tmp_path / "data")

    def shares(name):
        """By a sample's ids, the weights [T] of its tokens by linear, as parts of their sum."""
        samples = read_samples(tmp_path / "data" / name, source, settings, Ranks(CPU), Progress())
        streams = capture(source, source.family.layers, samples.batches, CPU)
        layer = source.materialise(f"{source.family.layers}.0", CPU)
        rounded = {name: (weight * 32).round() / 32 for name, weight in weights_of(layer).items()}
        weigh = QIGWeights(Ranks(CPU), steps=2)
        weights, _ = weigh(layer, 0, [], streams, functools.partial(holding, layer, rounded))
        found = {}
        for i, batch in enumerate(samples.batches):
            for j, ids in enumerate(batch["input_ids"].tolist()):
                own = {linear: parts[i].view(len(batch["input_ids"]), -1)[j] for linear, parts in weights.items()}
                found[tuple(ids)] = {linear: part / part.sum() for linear, part in own.items()}
        return found, [batch["input_ids"].shape for batch in samples.batches]

    together, shapes = shares(calibration.name)
    assert len({length for _, length in shapes}) > 1 and any(count > 1 for count, _ in shapes)
    for line in calibration.read_text().splitlines():
        (tmp_path / "data/one.jsonl").write_text(line)
        alone, _ = shares("one.jsonl")
        ((ids, expected),) = alone.items()
        for linear, part in expected.items():
            assert together[ids][linear].shape == part.shape
            # an output near no error at all may take the other sign of | | under kernels for another number of rows
            torch.testing.assert_close(together[ids][linear], part, rtol=0.01, atol=0.01 / len(part))
