"""Choosing plans for a table, with times that are made up: nothing is measured here."""

import json
import sys
from argparse import Namespace
from time import monotonic

import pytest
import torch

from benchmarks.kernel import cases, crossover, gpu_timing, tune
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.kernels import dequantize, gemm, int8, reference, tiles, tuned_tables
from vlmq_vllm.kernels.hardware import Hardware
from vlmq_vllm.kernels.layout import Geometry
from vlmq_vllm.kernels.tiles import BUCKETS, Plan, Tile

H200 = Hardware("sm_90", 132, 227 << 10)


@pytest.fixture
def tuner(monkeypatch):
    made = object.__new__(tune.Tuner)
    made.args = Namespace(bits=[3], tokens=[8], group_size=32)
    made.deadline, made.machine, made.l2 = monotonic() + 60, H200, 1 << 10
    made.table = json.loads(json.dumps(tuned_tables.table_of(H200)))
    made.device, made.measured = torch.device("cpu"), {}
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_candidates(bits, bucket):
    """There are some for every layer, all legal, none twice, and every one is tried with several numbers of parts."""
    for layer in cases.LAYERS:
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
    layer = cases.Layer("7b", "o", 1024, 64)
    tuner.tune(layer, 3)
    [(key, found)] = tuner.table["measured"].items()
    assert key == tuned_tables.key_of(Geometry.of(WeightFormat(3, 32, True), 64, 1024), 8)
    assert found == {"tile": {"rows": 64, "tokens": 8, "warps": 4, "stages": 3}, "splits": 2, "microseconds": 1.0}
    path = tuner.write(tmp_path)
    origin = json.loads(path.read_text())["origin"]
    assert path.name == "sm_90.json" and origin.startswith("plans measured") and "on a pretended GPU" in origin
    for cached in (tuned_tables.table_of, tiles._plan):
        cached.cache_clear()
    monkeypatch.setenv("VLMQ_TUNED", str(tmp_path))
    assert tiles.plan_for(8, Geometry.of(WeightFormat(3, 32, True), 64, 1024), H200) == best
    monkeypatch.undo()
    for cached in (tuned_tables.table_of, tiles._plan):
        cached.cache_clear()


def test_what_was_not_all_tried_is_not_kept(tuner, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    tuner.deadline = monotonic()
    tuner.tune(cases.Layer("7b", "o", 256, 64), 3)
    assert tuner.table["measured"] == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
    assert json.loads(tuner.write(tmp_path).read_text()) == tuned_tables.table_of(H200)


@pytest.mark.parametrize(
    ("winning", "wanted"),
    [((), None), ((8, 16), None), ((8,), None), ((32,), 32), ((8, 32), 32), ((16, 32), 16), ((8, 16, 32), 8)],
)
def test_first(winning, wanted):
    """All greater numbers of tokens must win, too; where the most do not, there is none."""
    assert crossover.first((8, 16, 32), winning.__contains__) == wanted


@pytest.fixture
def timed(monkeypatch):
    """Products by the twin on the CPU; a way takes as long as `times` says for it and its number of tokens."""
    times, calls = {}, []

    def way(name):
        def multiply(x, *args, token_scales=None):
            weight = args[-1]
            given = token_scales if name == "fused" else args[0] if len(args) == 2 else None
            calls.append((name, weight.geometry.bits, given is not None))
            return reference.gemm(x, weight, None, None if given is None else given[:, None])

        return multiply

    def measure(products, x, oracle, roundings, floor, seconds):
        calls.clear()
        x.normal_(generator=gpu_timing.generator(x.device))
        outs = [product(x) for product in products]
        name, bits, rounded = calls[0]
        taken = times[name, bits, rounded](len(outs[0]))
        return gpu_timing.Timing(taken, taken, taken, 1, 1), oracle.check(x, outs, roundings)

    for module, name in ((gemm, "fused"), (dequantize, "dequantised"), (int8, "int8")):
        monkeypatch.setattr(module, "gemm", way(name))
    monkeypatch.setattr(gpu_timing, "measure", measure)
    monkeypatch.setattr(crossover, "TOKENS", (3, 5, 9))
    monkeypatch.setattr(crossover, "INT8_TOKENS", (3, 5, 9))
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    return times


LAYERS = [cases.Layer("7b", "o", 64, 40), cases.Layer("7b", "qkv", 96, 20)]


@pytest.mark.parametrize(("from_8", "from_4", "wanted"), [(5, 9, 7), (9, 9, 9), (3, 99, None)])
def test_int8_crossover(tuner, timed, capsys, from_8, from_4, wanted):
    """int8 against the fused kernel with the same tokens, over layers and both widths; the table is left alone."""
    before = json.dumps(tuner.table)
    for bits, first in ((8, from_8), (4, from_4)):
        timed["fused", bits, True] = lambda m: 1.0
        timed["int8", bits, True] = lambda m, first=first: 0.5 if m >= first else 1.0
    found = crossover.int8_from(tuner.drawn(LAYERS, cases.INT8_BITS))
    assert found == wanted and json.dumps(tuner.table) == before and tuner.measured == {}
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told[:4]] == ["7b-o W8A8", "7b-o W4A8", "7b-qkv W8A8", "7b-qkv W4A8"]
    assert told[0].endswith(f"int8 is faster from {from_8} tokens on")
    end = "is not faster at 9 tokens" if wanted is None else f"is faster from {wanted} tokens on"
    assert told[-1] == f"int8 {end} (median); kernels/dispatch.py has INT8_FROM = 128"


@pytest.mark.parametrize(("first", "wanted"), [(5, 5), (99, 9)])
def test_crossover(tuner, timed, capsys, first, wanted):
    """Dequantising against the fused kernel, of 16-bit activations, into the table."""
    timed["fused", 3, False] = lambda m: 1.0
    timed["dequantised", 3, False] = lambda m: 0.5 if m >= first else 1.0
    tuner.cross(LAYERS)
    assert tuner.table["dequantise_from"] == wanted and list(tuner.measured) == ["crossover"]
    assert capsys.readouterr().out.count("not faster at 9") == (2 if first == 99 else 0)


def test_a_wrong_way_has_no_crossover(tuner, timed, monkeypatch):
    timed |= {(way, bits, True): lambda m: 1.0 for way in ("fused", "int8") for bits in (4, 8)}
    right = int8.gemm
    monkeypatch.setattr(int8, "gemm", lambda q, scales, weight: right(q, 1.02 * scales, weight))
    with pytest.raises(gpu_timing.Wrong, match="relative RMS error"):
        crossover.int8_from(tuner.drawn(LAYERS, [8]))


def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tune.py", str(tmp_path / "new")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        tune.main()
    assert not (tmp_path / "new").exists()
