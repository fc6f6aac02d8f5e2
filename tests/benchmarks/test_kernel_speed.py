"""The kernel benchmark's run without a GPU: refusals, failing peers, time that runs out, arguments."""

import os
import sys
from time import monotonic

import pytest
import torch

from benchmark_modules import MACHINE
from benchmarks import provenance
from benchmarks.journal import Journal
from benchmarks.kernel import contenders, gpu_timing, speed, speed_report
from benchmarks.kernel.bench import Bench, Refused
from benchmarks.kernel.cases import BITS, TOKENS, Block, Layer
from benchmarks.kernel.measured_weight import Clock, Setting
from kernel_problems import BF16

SMALL = Block(Layer("7b", "o", 256, 320), 4, (1, 5))
SETTING = Setting("cpu", BF16, 128, True, 1000, 4000.0)


def dense_times(factor: float) -> contenders.Kernel:
    """A kernel for the CPU whose result is `factor` times the product."""

    def packed(weight, dtype):
        def bind(copy):
            return lambda x: (factor * (x.double() @ copy["weight"].double().T)).to(x.dtype)

        return contenders.Packed({"weight": weight.dequantize(dtype)}, bind)

    return contenders.Kernel("Times", (2, 3, 4), packed)


def unpackable(weight, dtype):
    raise RuntimeError("no such\nformat")


def timed_by_nothing(products, x, oracle, roundings, floor):
    """In place of `gpu_timing.measure`: the check without a graph, and a time that says nothing."""
    error = oracle.check(x, [product(x) for product in products], roundings)
    return gpu_timing.Timing(2.0, 1.0, 3.0, len(products), 10), error


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Make a Bench on the CPU with other kernels: bench(vlmq=..., ...)."""
    monkeypatch.setattr(gpu_timing, "measure", timed_by_nothing)
    monkeypatch.setattr(gpu_timing, "settle", lambda: None)
    monkeypatch.setattr(gpu_timing, "release", lambda: None)

    def make(seconds=60.0, peer_seconds=60.0, setting=SETTING, **others):
        for name, kernel in others.items():
            monkeypatch.setitem(contenders.KERNELS, name, kernel)
        journal = Journal(tmp_path / "found.jsonl", speed_report.report)
        journal.add("machine", **MACHINE)
        clock = Clock(monotonic() + seconds, peer_seconds)
        return Bench(setting, list(others), journal, clock)

    return make


def kinds(bench) -> list[tuple]:
    return [(line["kind"], line["kernel"]) for line in bench.journal.lines[1:]]


def test_run(bench):
    """Ours and the dense product get figures, a wrong peer and one that cannot pack are listed with their errors."""
    broken = contenders.Kernel("Broken", (4,), unpackable)
    made = bench(vlmq=dense_times(1), cublas=dense_times(1), humming=dense_times(1.1), machete=broken)
    speed.compare(made, [SMALL])
    per_case = [("speed", "vlmq"), ("speed", "cublas"), ("failed", "humming"), ("failed", "machete")]
    assert kinds(made) == per_case * 2
    mine, dense, wrong, unpacked = made.journal.lines[1:5]
    assert (mine["layer"], mine["bits"], mine["tokens"], dense["bits"]) == ("7b-o", 4, 1, 16)
    assert mine["moved_bytes"] == 320 * (128 + 2 * 2) + 2 * (256 + 320)
    assert mine["gigabytes_per_second"] == pytest.approx(mine["moved_bytes"] / 2e-6 / 1e9)
    assert mine["share"] == pytest.approx(mine["gigabytes_per_second"] / 4000)
    assert mine["stored_bytes"] == 2 * 320 * 256 and mine["copies"] == 1 and mine["launches"] == 1
    assert wrong["case"] == "7b-o W4 M=1" and "relative RMS error" in wrong["reason"]
    assert unpacked["reason"] == "RuntimeError: no such format"
    assert len(made.journal.out.read_text().splitlines()) == 9
    assert made.journal.out.with_suffix(".md").exists()


def test_dense_once(bench):
    """The dense product is measured for one width only."""
    made = bench(vlmq=dense_times(1), cublas=dense_times(1))
    for bits in (4, 2):
        made.run(Block(SMALL.layer, bits, (1,)))
    assert kinds(made) == [("speed", "vlmq"), ("speed", "cublas"), ("speed", "vlmq")]


def test_refused(bench, monkeypatch, capsys):
    """If ours is wrong there is no table, no figure of ours, and an exit status."""
    made = bench(vlmq=dense_times(1.1), cublas=dense_times(1))
    made.journal.add("speed", kernel="vlmq", microseconds=1.0)
    made.journal.out.with_suffix(".md").write_text("old")
    monkeypatch.setattr(speed, "run", lambda args, setting, journal: speed.compare(made, [SMALL]))
    reason = speed.guarded(None, SETTING, made.journal)
    assert reason.count("relative RMS error") == 2 and "M=1:" in reason and "M=5:" in reason
    assert kinds(made) == [("refused", "vlmq")]
    assert not made.journal.out.with_suffix(".md").exists() and '"speed"' not in made.journal.out.read_text()
    assert capsys.readouterr().out == ""


def test_refused_later(bench):
    """A case that the first look did not cover."""
    made = bench(vlmq=dense_times(1.1))
    with pytest.raises(Refused, match="7b-o W4 M=1: Wrong"):
        made.run(SMALL)


def test_time(bench, monkeypatch):
    """What there is no time for is listed, without drawing its weight; a peer that took its own time gets no more."""
    made = bench(seconds=-1.0, vlmq=dense_times(1), cublas=dense_times(1))
    with monkeypatch.context() as patch:
        patch.delattr(gpu_timing, "draw")
        made.run(SMALL)
    assert kinds(made) == [("skipped", "vlmq"), ("skipped", "cublas")] * 2
    assert made.journal.lines[1]["reason"] == "no time left"
    made = bench(peer_seconds=0.0, vlmq=dense_times(1), humming=dense_times(1))
    made.run(SMALL)
    assert kinds(made) == [("speed", "vlmq"), ("speed", "humming"), ("speed", "vlmq"), ("skipped", "humming")]
    made = bench(vlmq=dense_times(1))
    made.clock.count("vlmq", 100.0)
    assert made.clock.why_not("vlmq") == "no time left" and made.clock.why_not("cublas") is None


def test_asymmetric(bench):
    made = bench(setting=Setting("cpu", BF16, 64, False, 1000, 4000.0), vlmq=dense_times(1))
    assert contenders.KERNELS["vlmq"].why_not(4, False)
    made.run(SMALL)
    assert kinds(made) == []  # dense_times says of itself that it takes symmetric weights only


def test_lost(bench, monkeypatch):
    """A peer that breaks the GPU ends the run; what was found before stays."""
    made = bench(vlmq=dense_times(1), humming=dense_times(1.1))
    calls = iter([None] * 2)  # after the preparations of vlmq and of the peer; then the one after the failure

    def settle():
        if next(calls, "broken"):
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu_timing, "settle", settle)
    monkeypatch.setattr(speed, "run", lambda args, setting, journal: made.run(SMALL))
    assert "humming at 7b-o W4 M=1 broke the CUDA context" in speed.guarded(None, SETTING, made.journal)
    assert kinds(made) == [("speed", "vlmq"), ("failed", "humming")]
    assert made.journal.out.with_suffix(".md").exists()


def test_lost_by_ours(bench, monkeypatch):
    """If it is ours that breaks the GPU, that is a refusal."""
    made = bench(vlmq=dense_times(1.1))
    calls = iter([None])

    def settle():
        if next(calls, "broken"):
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu_timing, "settle", settle)
    with pytest.raises(Refused, match="relative RMS error.*; vlmq at 7b-o W4 M=1 broke the CUDA context"):
        made.preflight([SMALL])


def test_arguments():
    args = speed.parser().parse_args([])
    assert (args.bits, args.tokens, args.shapes) == (list(BITS), list(TOKENS), [])
    assert args.peers == ["cublas", "humming", "marlin", "machete", "triton", "gemlite", "cutlass", "int_mm"]
    assert args.int8_bits == [8, 4] and speed.parser().parse_args(["--int8-bits"]).int8_bits == []
    assert (args.seconds, args.group_size, args.dtype, args.out) == (540, 128, "bf16", None)
    args = speed.parser().parse_args(["--peers", *["--tokens", "3", "--bits", "2", "3", "--shapes", "7b", "down"]])
    assert (args.peers, args.tokens, args.bits, args.shapes) == ([], [3], [2, 3], ["7b", "down"])
    assert provenance.public(["--bits", "4", "--out", "/a/b", "--seed", "1"], ("--out",)) == [
        "--bits",
        "4",
        "--seed",
        "1",
    ]
    assert provenance.public(["--out=/a/b"], ("--out",)) == []


@pytest.mark.parametrize(
    "arguments", ["--bits 5", "--int8-bits 2", "--tokens 0", "--tokens x", "--shapes 8b", "--peers exllama"]
)
def test_refused_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        speed.parser().parse_args(arguments.split())
    assert end.value.code == 2 and arguments.split()[0] in capsys.readouterr().err


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    with pytest.raises(SystemExit, match="no GPU"):
        speed.main()


def test_ours_absent(monkeypatch):
    monkeypatch.setitem(contenders.KERNELS, "vlmq", contenders.Kernel("X", (4,), None, ("no_such_kernel",)))
    before = dict(os.environ)
    with pytest.raises(Refused, match="no_such_kernel"):
        speed.present(["vlmq"], Journal(None, speed_report.report))
    assert dict(os.environ) == before  # the serve benchmark's servers once inherited a quiet log from here
