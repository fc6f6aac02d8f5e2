"""The kernel benchmark as far as it goes without a GPU: cases, arithmetic, the check, the run of cases, the tables."""

import sys
from time import monotonic

import pytest
import torch
from benchmark_modules import load
from kernel_problems import BF16, FP16, FP32

gpu_timing, kernel_bench, kernel_peers, kernel_cases, kernel_report, kernels = load(
    "gpu_timing", "kernel_bench", "kernel_peers", "kernel_cases", "kernel_report", "kernels"
)
from kernel_cases import BITS, LAYERS, TOKENS, Block, Case, Layer, chosen, ordered, target_of, weight_bytes  # noqa: E402
from kernel_report import Journal, report  # noqa: E402

BY_LABEL = {layer.label: layer for layer in LAYERS}
SMALL = Block(Layer("7b", "o", 256, 320), 4, (1, 5))
SETTING = kernel_bench.Setting("cpu", BF16, 128, True, 1000, 4000.0)
MACHINE = {
    "date": "2026-11-21T10:00:00+00:00",
    "device": "A card",
    "driver": "580.1",
    "versions": {"torch": "2.11.0", "vllm": "not installed"},
    "command": "python benchmarks/kernels.py --bits 4",
    "dtype": "bf16",
    "group_size": 128,
    "symmetric": True,
    "copied_bytes": 1 << 30,
    "copy": 4000.0,
    "empty": 1.25,
}


def test_layers():
    """Widths of the models' published configurations: hidden, heads with those of keys and values, intermediate."""
    for model, hidden, heads, kv_heads, intermediate in (
        ("7b", 3584, 28, 4, 18944),
        ("32b", 5120, 40, 8, 27648),
        ("72b", 8192, 64, 8, 29568),
    ):
        found = {layer.name: (layer.columns, layer.rows) for layer in LAYERS if layer.model == model}
        assert found == {
            "qkv": (hidden, 128 * (heads + 2 * kv_heads)),
            "o": (hidden, hidden),
            "gate_up": (hidden, 2 * intermediate),
            "down": (intermediate, hidden),
        }


@pytest.mark.parametrize(("bits", "megabytes"), [(16, 271.6), (4, 70.0), (3, 53.0), (2, 36.1)])
def test_bytes(bits, megabytes):
    layer = BY_LABEL["7b-gate_up"]
    assert weight_bytes(layer, bits) / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert Case(layer, bits, 7).moved_bytes() == weight_bytes(layer, bits) + 7 * 2 * (3584 + 37888)


def test_bytes_of_groups():
    """A last group that is not full, one group per row, zero points."""
    layer = Layer("", "", 200, 40)
    assert weight_bytes(layer, 4, 128) == 40 * (100 + 2 * 2)
    assert weight_bytes(layer, 4, -1) == 40 * (100 + 2)
    assert weight_bytes(layer, 2, 64, symmetric=False) == 40 * 200 // 4 + 40 * 4 * 2 + 40 * 4 * 2 // 8


def test_order():
    """Every case exactly once, and the telling ones of the 7B model's large layers first."""
    blocks = ordered(chosen([]), list(BITS), list(TOKENS))
    cases = [case for block in blocks for case in block.cases]
    assert len(cases) == len(set(cases)) == len(LAYERS) * len(BITS) * len(TOKENS)
    assert blocks[0] == Block(BY_LABEL["7b-gate_up"], 4, (1, 8, 16, 64))
    assert {block.layer.label for block in blocks[:6]} == {"7b-gate_up", "7b-down"}


def test_chosen():
    assert [layer.label for layer in chosen(["32b", "7b-down"])][:2] == ["7b-down", "32b-qkv"]
    assert {layer.model for layer in chosen(["down"])} == {"7b", "32b", "72b"}
    assert [block.tokens for block in ordered(chosen(["7b-o"]), [2], [3, 8])] == [(8,), (3,)]


@pytest.mark.parametrize(
    ("label", "bits", "tokens", "found", "missed"),
    [  # found: microseconds, share, speedup
        ("7b-gate_up", 4, 1, (21.0, 0.76, None), []),
        ("7b-gate_up", 4, 8, (23.0, 0.70, 3.0), ["70% of copy, wanted 75%"]),
        ("72b-down", 3, 1, (1.0, 0.71, 3.4), ["3.40 x cuBLAS, wanted 3.5"]),
        ("72b-down", 2, 1, (1.0, 0.61, None), ["cuBLAS was not measured"]),
        ("7b-qkv", 4, 1, (4.5, 0.45, None), []),
        ("7b-o", 2, 8, (4.6, 0.20, None), ["4.6 us, wanted 4.5", "3.7 us over its floor, wanted 2.5"]),
        ("7b-qkv", 2, 64, (1.0, 0.1, 0.5), None),
        ("7b-qkv", 2, 256, (1.0, 0.1, 0.9), []),
        ("32b-o", 3, 4096, (1.0, 0.1, 0.92), ["0.92 x cuBLAS, wanted 0.93"]),
        ("7b-gate_up", 2, 32, (1.0, 0.1, 0.1), None),
    ],
)
def test_targets(label, bits, tokens, found, missed):
    target = target_of(Case(BY_LABEL[label], bits, tokens))
    assert (target and target.missed(*found)) == missed


def test_copies():
    """Enough to push a copy out of L2, few enough for their limit, and one at least; graphs hold whole rounds."""
    assert gpu_timing.copies_needed(weight=100, moved=150, l2=1000) == 27
    assert gpu_timing.copies_needed(weight=1 << 30, moved=1, l2=1000) == 2
    assert gpu_timing.copies_needed(weight=3 << 30, moved=3 << 30, l2=1000) == 1
    assert gpu_timing.launches_needed(copies=27, floor=2.0) == 81
    assert gpu_timing.launches_needed(copies=3, floor=400.0) == 3
    assert gpu_timing.launches_needed(copies=1, floor=5000.0) == 1


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_check(dtype, symmetric):
    """The exact product rounded once passes for one rounding; that of the rounded weight for two."""
    format = gpu_timing.WeightFormat(3, 64, symmetric)
    weight = gpu_timing.draw(format, 300, 200, dtype, "cpu")
    oracle = gpu_timing.Oracle(weight)
    x = torch.randn(9, 200).to(dtype)
    exact = x.double() @ weight.dequantize().double().T
    assert 0 < oracle.check(x, [exact.to(dtype)], 1) < gpu_timing.bound(dtype, 200, 1)
    oracle.check(x, [(x.double() @ weight.dequantize(dtype).double().T).to(dtype)], 2)
    with pytest.raises(gpu_timing.Wrong, match="relative RMS error is .* above"):
        oracle.check(x, [exact.to(dtype), (exact * 1.02).to(dtype)], 2)


def test_check_of_whole_output():
    """A NaN is found outside of the sample, too, and so is an output of another shape."""
    weight = gpu_timing.draw(gpu_timing.WeightFormat(2, 32, True), 600, 64, FP32, "cpu")
    oracle = gpu_timing.Oracle(weight)
    x = torch.randn(400, 64)
    out = x @ weight.dequantize().T
    assert len(oracle.rows) == gpu_timing.SAMPLE
    oracle.check(x, [out], 1)
    for row in (0, 599):
        poisoned = out.clone()
        poisoned[399, row] = torch.nan
        with pytest.raises(gpu_timing.Wrong, match="NaN or infinity is left"):
            oracle.check(x, [poisoned], 1)
    with pytest.raises(gpu_timing.Wrong, match=r"its output is \[400, 599\], not \[400, 600\]"):
        oracle.check(x, [out[:, 1:]], 1)


def test_copies_are_their_own():
    made = []
    packed = kernel_peers.Packed({"weight": torch.ones(4)}, lambda copy: made.append(copy) or (lambda x: x))
    assert len(packed.products(3)) == 3 and packed.nbytes == 16
    assert len({copy["weight"].data_ptr() for copy in made} | {packed.tensors["weight"].data_ptr()}) == 4


def test_accepted():
    """Arguments that another version of a peer does not have are left out."""
    assert kernel_peers.accepted(lambda a, perm: (a, perm), perm=2)(a=1) == (1, 2)
    assert kernel_peers.accepted(lambda a: a, perm=2)(a=1) == 1


def test_absent():
    missing = kernel_peers.Kernel("X", (4,), None, modules=("no_such_peer",))
    assert missing.why_absent() == "import no_such_peer: ModuleNotFoundError: No module named 'no_such_peer'"
    old = kernel_peers.Kernel("X", (4,), None, operators=("no_such_operator",))
    assert old.why_absent() == "this vLLM has no operator no_such_operator"
    assert kernel_peers.KERNELS["marlin"].why_not(3, True) == "takes 4 bits"
    assert "symmetric" in kernel_peers.KERNELS["humming"].why_not(3, False)
    assert kernel_peers.KERNELS["vlmq"].why_not(3, False) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_ours_and_dense(bits, symmetric, device):
    """The two kernels that run anywhere, with copies of their weight, pass the benchmark's own check."""
    weight = gpu_timing.draw(gpu_timing.WeightFormat(bits, 128, symmetric), 72, 512, FP16, device)
    x = torch.randn(3, 512, device=device).to(FP16)
    oracle = gpu_timing.Oracle(weight)
    for name in ("vlmq", "cublas"):
        kernel = kernel_peers.KERNELS[name]
        assert kernel.why_absent() is None
        packed = kernel.pack(weight, FP16)
        oracle.check(x, [product(x) for product in packed.products(2)], kernel.roundings)
        assert packed.nbytes >= weight_bytes(Layer("", "", 512, 72), 16 if name == "cublas" else bits)


def dense_times(factor: float) -> kernel_peers.Kernel:
    """A kernel for the CPU whose result is `factor` times the product."""

    def packed(weight, dtype):
        def bind(copy):
            return lambda x: (factor * (x.double() @ copy["weight"].double().T)).to(x.dtype)

        return kernel_peers.Packed({"weight": weight.dequantize(dtype)}, bind)

    return kernel_peers.Kernel("Times", (2, 3, 4), packed)


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
            monkeypatch.setitem(kernel_peers.KERNELS, name, kernel)
        journal = Journal(tmp_path / "found.jsonl")
        journal.add("machine", **MACHINE)
        clock = kernel_bench.Clock(monotonic() + seconds, peer_seconds)
        return kernel_bench.Bench(setting, list(others), journal, clock)

    return make


def kinds(bench) -> list[tuple]:
    return [(line["kind"], line["kernel"]) for line in bench.journal.lines[1:]]


def test_run(bench):
    """Ours and the dense product get figures, a wrong peer and one that cannot pack are listed with their errors."""
    broken = kernel_peers.Kernel("Broken", (4,), unpackable)
    made = bench(vlmq=dense_times(1), cublas=dense_times(1), humming=dense_times(1.1), machete=broken)
    kernels.compare(made, [SMALL])
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
    monkeypatch.setattr(kernels, "run", lambda args, setting, journal: kernels.compare(made, [SMALL]))
    reason = kernels.guarded(None, SETTING, made.journal)
    assert reason.count("relative RMS error") == 2 and "M=1:" in reason and "M=5:" in reason
    assert kinds(made) == [("refused", "vlmq")]
    assert not made.journal.out.with_suffix(".md").exists() and "speed" not in made.journal.out.read_text()
    assert capsys.readouterr().out == ""


def test_refused_later(bench):
    """A case that the first look did not cover."""
    made = bench(vlmq=dense_times(1.1))
    with pytest.raises(kernel_bench.Refused, match="7b-o W4 M=1: Wrong"):
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
    made = bench(setting=kernel_bench.Setting("cpu", BF16, 64, False, 1000, 4000.0), vlmq=dense_times(1))
    assert kernel_peers.KERNELS["vlmq"].why_not(4, False)
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
    monkeypatch.setattr(kernels, "run", lambda args, setting, journal: made.run(SMALL))
    assert "humming at 7b-o W4 M=1 broke the CUDA context" in kernels.guarded(None, SETTING, made.journal)
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
    with pytest.raises(kernel_bench.Refused, match="relative RMS error.*; vlmq at 7b-o W4 M=1 broke the CUDA context"):
        made.preflight([SMALL])


def speed(kernel, layer, bits, tokens, microseconds, share=0.5) -> dict:
    found = {"gigabytes_per_second": 4000 * share, "share": share, "teraflops": 12.3}
    where = {"kernel": kernel, "layer": layer, "bits": bits, "tokens": tokens}
    return {"kind": "speed", "microseconds": microseconds} | where | found


def test_report():
    """Made up lines: times, ratios, targets, order, and what has no figure."""
    text = report(
        [
            {"kind": "machine"} | MACHINE,
            {"kind": "absent", "kernel": "gemlite", "reason": "import gemlite: none"},
            speed("vlmq", "7b-gate_up", 4, 8, 25.0, share=0.7),
            speed("vlmq", "7b-gate_up", 4, 1, 20.0, share=0.875),
            speed("cublas", "7b-gate_up", 16, 1, 63.0),
            speed("marlin", "7b-gate_up", 4, 1, 28.0),
            speed("vlmq", "7b-qkv", 4, 16, 4.0),
            speed("vlmq", "7b-qkv", 2, 1, 4.0, share=0.5),
            {"kind": "failed", "kernel": "humming", "case": "7b-o W4 M=1", "reason": "Wrong: x"},
            {"kind": "failed", "kernel": "humming", "case": "7b-o W4 M=8", "reason": "Wrong: x"},
            {"kind": "skipped", "kernel": "vlmq", "case": "72b-o W4 M=8", "reason": "no time left"},
        ]
    )
    lines = text.splitlines()
    assert lines[0] == "# Speed of the kernels, 2026-11-21"
    assert "A card (driver, clocks, power limit: 580.1); torch 2.11.0, vllm not installed." in lines
    assert "Copy of 1024 MiB in device memory: 4,000 GB/s read and written." in text
    w4 = lines[lines.index("## W4") + 2 : lines.index("## W2")]
    assert w4[0] == "| layer | M | us | GB/s | share | cuBLAS, us | Marlin, us | target |"
    assert w4[2:5] == [
        "| 7b-qkv | 16 | 4.0 | 2,000 | 50% |  |  |  |",
        "| 7b-gate_up | 1 | 20.0 | 3,500 | 88% | 63.0 (3.15 x) | 28.0 (1.40 x) | met |",
        "| 7b-gate_up | 8 | 25.0 | 2,800 | 70% |  |  | 70% of copy, wanted 75% |",
    ]
    w2 = lines[lines.index("## W2") + 2 :]
    assert w2[0] == "| layer | M | us | GB/s | share | target |" and w2[2].endswith("| 50% | met |")
    left = lines[lines.index("## Left out") + 2 :]
    assert left == [
        "* GemLite absent: `import gemlite: none`",
        "* Humming failed: `Wrong: x` (2: 7b-o W4 M=1, 7b-o W4 M=8)",
        "* vlmq skipped: `no time left` (1: 72b-o W4 M=8)",
    ]


def test_report_of_first_minute():
    text = report([{"kind": "machine"} | MACHINE, speed("cublas", "7b-o", 16, 1, 6.25)])
    assert "A kernel that does nothing takes 1.25 us" in text and "Left out" not in text
    assert "| 7b-o | 1 | 6.2 | 2,000 | 50% | 12 |" in text


def test_arguments():
    args = kernels.parser().parse_args([])
    assert (args.bits, args.tokens, args.shapes) == (list(BITS), list(TOKENS), [])
    assert args.peers == ["cublas", "humming", "marlin", "machete", "triton", "gemlite"]
    assert (args.seconds, args.group_size, args.dtype, args.out) == (540, 128, "bf16", None)
    args = kernels.parser().parse_args(["--peers", *["--tokens", "3", "--bits", "2", "3", "--shapes", "7b", "down"]])
    assert (args.peers, args.tokens, args.bits, args.shapes) == ([], [3], [2, 3], ["7b", "down"])
    assert kernels.public(["--bits", "4", "--out", "/a/b", "--seed", "1"]) == ["--bits", "4", "--seed", "1"]
    assert kernels.public(["--out=/a/b"]) == []


@pytest.mark.parametrize("arguments", ["--bits 5", "--tokens 0", "--tokens x", "--shapes 8b", "--peers exllama"])
def test_refused_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        kernels.parser().parse_args(arguments.split())
    assert end.value.code == 2 and arguments.split()[0] in capsys.readouterr().err


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="no GPU"):
        kernels.main()


def test_ours_absent(monkeypatch):
    monkeypatch.setitem(kernel_peers.KERNELS, "vlmq", kernel_peers.Kernel("X", (4,), None, ("no_such_kernel",)))
    with pytest.raises(kernel_bench.Refused, match="no_such_kernel"):
        kernels.present(["vlmq"], Journal(None))
