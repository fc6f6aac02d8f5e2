"""Products with activations of 8 bits in the kernel benchmark, without a GPU: what is run, and what is checked."""

import sys
from time import monotonic
from types import ModuleType

import pytest
import torch

from benchmark_modules import MACHINE
from benchmarks.journal import Journal
from benchmarks.kernel import contenders, gpu_timing, int8_activations, speed_report
from benchmarks.kernel.bench import Bench, Refused
from benchmarks.kernel.cases import Block, Layer
from benchmarks.kernel.interface import Kernel, Packed
from benchmarks.kernel.measured_weight import Clock, Setting
from kernel_problems import BF16, FP16

LAYER = Layer("7b", "o", 64, 40)
SETTING = Setting("cpu", BF16, 32, True, 1000, 4000.0)


def drawn(bits: int, group: int, dtype=BF16, rows=40, columns=64):
    return gpu_timing.draw(gpu_timing.WeightFormat(bits, group, True), rows, columns, dtype, "cpu")


def rounded_product(x, weight, dtype, factor: float = 1.0) -> torch.Tensor:
    """s (q W^T) in float64, rounded once."""
    out = x.scales.double() * (x.q.double() @ weight.dequantize().double().T)
    return (factor * out).to(dtype)


def test_tokens_are_drawn_anew_in_place():
    """A captured graph reads the same memory: every form of the tokens is of the new ones."""
    x = int8_activations.Rounded.of(torch.randn(5, 33).to(BF16))
    q, octets, scales = before = x.q, x.bytes, x.scales
    old = [tensor.clone() for tensor in before]
    assert x.normal_(generator=torch.Generator().manual_seed(7)) is x
    wanted = torch.empty(5, 33, dtype=BF16).normal_(generator=torch.Generator().manual_seed(7)).double()
    assert x.q is q and x.bytes is octets and x.scales is scales and x.device == q.device
    assert all(not torch.equal(tensor, past) for tensor, past in zip(before, old, strict=True))
    assert torch.equal(octets.double(), q.double()) and octets.abs().max() == 127
    assert scales.dtype == torch.float32 and scales.shape == (5, 1)
    torch.testing.assert_close(scales.double(), wanted.abs().amax(1, keepdim=True) / 127, rtol=2**-23, atol=0)
    # Half a step, and what rounding s in float32 may add to it.
    assert ((scales.double() * q.double() - wanted).abs() <= scales.double() * (0.5 + 2**-15)).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_check(dtype):
    """The product of the rounded tokens passes; that of the unrounded, a wrong scale of a token, and NaN do not."""
    weight, given = drawn(4, 32, dtype, 300, 200), torch.randn(9, 200).to(dtype)
    x, oracle = int8_activations.Rounded.of(given), int8_activations.RoundedOracle(gpu_timing.Oracle(weight))
    right = rounded_product(x, weight, dtype)
    assert 0 < oracle.check(x, [right, right.clone()], 1) < gpu_timing.bound(dtype, 200, 1)
    unrounded = (given.double() @ weight.dequantize().double().T).to(dtype)
    unscaled, broken = right.clone(), right.clone()
    unscaled[3] *= 1.25
    broken[8, 299] = torch.nan
    for wrong, told in (
        (unrounded, "RMS error"),
        (unscaled, "RMS error"),
        (broken, "NaN"),
        (right[:, 1:], "output is"),
    ):
        with pytest.raises(gpu_timing.Wrong, match=told):
            oracle.check(x, [right, wrong], 1)


def scaled_mm(a, b, scale_a, scale_b, out_dtype):
    """vLLM's contract in plain torch: bytes, b column by column, a scale for every row of a and of the weight."""
    assert a.dtype == b.dtype == torch.int8 and a.is_contiguous() and b.stride(0) == 1
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (b.shape[1], 1)
    assert scale_a.dtype == scale_b.dtype == torch.float32
    return (scale_a * scale_b.T * (a.double() @ b.double())).to(out_dtype)


@pytest.mark.parametrize("name", ["cutlass", "int_mm"])
def test_peers(name, monkeypatch):
    """Each multiplies a copy of the weight within one rounding of the exact product, for odd shapes too."""
    vllm = ModuleType("vllm")
    vllm._custom_ops = ModuleType("vllm._custom_ops")
    vllm._custom_ops.cutlass_scaled_mm = scaled_mm
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    kernel = contenders.KERNELS[name]
    assert "8" in kernel.why_not(8, True) and kernel.why_not(8, True, 8) is None
    assert "symmetric" in kernel.why_not(8, False, 8) and kernel.why_not(4, True, 8) == "takes 8 bits"
    for rows, columns, tokens in ((40, 64, 17), (33, 71, 24)):
        weight = drawn(8, -1, BF16, rows, columns)
        weight.codes[0], weight.codes[1] = 0, 255
        x = int8_activations.Rounded.of(torch.randn(tokens, columns).to(BF16))
        oracle = int8_activations.RoundedOracle(gpu_timing.Oracle(weight))
        packed = kernel.pack(weight, BF16)
        outs = [product(x) for product in packed.products(2)]
        assert all(out.dtype == BF16 for out in outs) and packed.nbytes == rows * (columns + 4)
        oracle.check(x, outs, 1)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, -1, True), (4, 32, False)])
def test_ours(bits, group, symmetric, device):
    """By int8 at 128 tokens, with copies of the weight, past the benchmark's own check."""
    weight = gpu_timing.draw(gpu_timing.WeightFormat(bits, group, symmetric), 40, 64, FP16, device)
    x = int8_activations.Rounded.of(torch.randn(128, 64, device=device).to(FP16))
    kernel = contenders.KERNELS["vlmq-int8"]
    assert kernel.why_absent() is None and kernel.why_not(bits, symmetric, 8) is None and kernel.why_not(bits, True)
    oracle = int8_activations.RoundedOracle(gpu_timing.Oracle(weight))
    oracle.check(x, [product(x) for product in kernel.pack(weight, FP16).products(2)], kernel.roundings)


def timed_by_nothing(products, x, oracle, roundings, floor):
    x.normal_()
    error = oracle.check(x, [product(x) for product in products], roundings)
    return gpu_timing.Timing(2.0, 1.0, 3.0, len(products), 10), error


@pytest.fixture
def bench(monkeypatch):
    """A Bench on the CPU whose every kernel is made of torch; bench(factor) makes ours for 8 bits wrong by it."""
    monkeypatch.setattr(gpu_timing, "measure", timed_by_nothing)
    monkeypatch.setattr(gpu_timing, "settle", lambda: None)
    seen = []

    def plain(weight, dtype):
        seen.append(weight.format)
        return Packed(
            {"w": weight.dequantize(dtype)}, lambda copy: lambda x: (x.double() @ copy["w"].double().T).to(x.dtype)
        )

    def make(factor: float = 1.0):
        def rounded(weight, dtype):
            seen.append(weight.format)
            return Packed({"w": weight.codes}, lambda copy: lambda x: rounded_product(x, weight, dtype, factor))

        for name, pack, activations in (
            ("vlmq-int8", rounded, (8,)),
            ("vlmq", plain, (16, 8)),
            ("cublas", plain, (16, 8)),
            ("marlin", plain, (16,)),
            ("int_mm", rounded, (8,)),
        ):
            bits = (8,) if name == "int_mm" else (4, 8)
            monkeypatch.setitem(contenders.KERNELS, name, Kernel(name, bits, pack, activations=activations))
        journal = Journal(None, speed_report.report)
        journal.add("machine", **MACHINE)
        names = ["vlmq-int8", "vlmq", "cublas", "marlin", "int_mm"]
        return Bench(SETTING, names, journal, Clock(monotonic() + 60, 60.0)), seen

    return make


def test_run(bench):
    """Ours first, then 16 bits of activations and the peers that take part; what is the same is measured once."""
    made, formats = bench()
    blocks = [Block(LAYER, 8, (3,), 8), Block(LAYER, 4, (3,), 8), Block(LAYER, 4, (3,))]
    made.preflight(blocks)
    for block in blocks:
        made.run(block)
    lines = made.journal.lines[1:]
    assert [(line["kernel"], line["bits"], line["activations"]) for line in lines] == [
        ("vlmq-int8", 8, 8),
        ("vlmq", 8, 16),
        ("cublas", 16, 16),
        ("int_mm", 8, 8),
        ("vlmq-int8", 4, 8),
        ("vlmq", 4, 16),
        ("marlin", 4, 16),
    ]
    assert {(format.bits, format.group_size) for format in formats} == {(8, -1), (4, 32)}
    assert [line["moved_bytes"] for line in lines[:2]] == [40 * 66 + 3 * (64 + 4 + 80), 40 * 66 + 3 * 2 * 104]
    assert "## W8A8" in made.journal.tables() and "## W4A8" in made.journal.tables()


def test_refused(bench):
    """If ours is wrong, no case begins; the refusal names the width of the activations."""
    made, _ = bench(1.1)
    blocks = [Block(LAYER, 8, (3,), 8), Block(LAYER, 4, (3,))]
    with pytest.raises(Refused, match="7b-o W8A8 M=3: Wrong: its relative RMS error") as refusal:
        made.preflight(blocks)
    assert "W4 " not in str(refusal.value)
    with pytest.raises(Refused, match="7b-o W8A8 M=3: Wrong"):
        made.run(blocks[0])
    assert len(made.journal.lines) == 1
