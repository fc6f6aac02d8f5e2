"""Choosing plans for a table, with times that are made up: nothing is measured here."""

import json
import sys
from argparse import Namespace
from time import monotonic

import pytest
import torch
from benchmark_modules import load

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.kernels import tables, tiles
from vlmq_vllm.kernels.hardware import Hardware
from vlmq_vllm.kernels.layout import Geometry
from vlmq_vllm.kernels.tiles import BUCKETS, Plan, Tile

gpu_timing, kernel_cases, tune = load("gpu_timing", "kernel_cases", "tune")
H200 = Hardware("sm_90", 132, 227 << 10)


@pytest.fixture
def tuner(monkeypatch):
    made = object.__new__(tune.Tuner)
    made.args = Namespace(bits=[3], tokens=[8], group_size=32)
    made.deadline, made.machine, made.l2 = monotonic() + 60, H200, 1 << 10
    made.table = json.loads(json.dumps(tables.table_of(H200)))
    made.device = torch.device("cpu")
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_candidates(bits, bucket):
    """There are some for every layer, all legal, none twice, and every one is tried with several numbers of parts."""
    for layer in kernel_cases.LAYERS:
        geometry = Geometry.of(WeightFormat(bits, 128, True), layer.rows, layer.columns)
        plans = list(tune.candidates(bucket, geometry, H200))
        assert len(plans) >= 6 and len(set(plans)) == len(plans)
        for plan in plans:
            assert tiles.why_not(plan, bucket, geometry, H200) is None
            options = tune.divided(plan, bucket, geometry, H200)
            assert all(tiles.why_not(option, bucket, geometry, H200) is None for option in options)
            assert options[0].splits == 1


def test_the_fastest_right_plan_is_kept(tuner, monkeypatch, tmp_path):
    """Also when only its division makes it the fastest; a plan that fails has no time and is named."""
    best, broken = Plan(Tile(64, 8, 4, 3), 2), Tile(64, 8, 2, 2)

    def measure(products, x, *args):
        plan = products[0].__defaults__[1]
        if plan.tile == broken:
            raise RuntimeError("a wrong result")
        fast = 1.0 if plan == best else 2.0 if plan.tile == best.tile else 3.0
        return gpu_timing.Timing(fast, fast, fast, 1, 1), 0.0

    monkeypatch.setattr(gpu_timing, "measure", measure)
    monkeypatch.setattr(gpu_timing, "settle", lambda: None)
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
    layer = kernel_cases.Layer("7b", "o", 1024, 64)
    tuner.tune(layer, 3)
    [(key, found)] = tuner.table["measured"].items()
    assert key == tables.key_of(Geometry.of(WeightFormat(3, 32, True), 64, 1024), 8)
    assert found == {"tile": {"rows": 64, "tokens": 8, "warps": 4, "stages": 3}, "splits": 2, "microseconds": 1.0}
    path = tuner.write(tmp_path)
    assert path.name == "sm_90.json" and "a pretended GPU" in json.loads(path.read_text())["origin"]
    for cached in (tables.table_of, tiles._plan):
        cached.cache_clear()
    monkeypatch.setenv("VLMQ_TUNED", str(tmp_path))
    assert tiles.plan(8, Geometry.of(WeightFormat(3, 32, True), 64, 1024), H200) == best
    monkeypatch.undo()
    for cached in (tables.table_of, tiles._plan):
        cached.cache_clear()


def test_what_was_not_all_tried_is_not_kept(tuner, monkeypatch):
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    tuner.deadline = monotonic()
    tuner.tune(kernel_cases.Layer("7b", "o", 256, 64), 3)
    assert tuner.table["measured"] == {}


def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tune.py", str(tmp_path / "new")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        tune.main()
    assert not (tmp_path / "new").exists()
