"""The kernel benchmark's numbers without a GPU: cases, bytes, targets, and the tables made of lines."""

import pytest

from benchmark_modules import MACHINE
from benchmarks.kernel import speed_report
from benchmarks.kernel.cases import (
    BITS,
    INT8_BITS,
    INT8_FROM,
    LAYERS,
    TOKENS,
    Block,
    Case,
    Layer,
    chosen,
    group_of,
    ordered,
    weight_bytes,
)
from benchmarks.kernel.speed_report import report
from benchmarks.kernel.targets import target_of
from vlmq_vllm.kernels import dispatch

BY_LABEL = {layer.label: layer for layer in LAYERS}


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


def test_bytes_of_int8():
    """Activations of a byte each with a scale of four; weights of 8 bits have one scale per row whatever the group."""
    case = Case(Layer("7b", "x", 200, 40), 8, 128, 8)
    assert case.label == "7b-x W8A8 M=128" and Block(case.layer, 4, (1,), 8).label == "7b-x W4A8"
    assert case.moved_bytes(64) == 40 * (200 + 2) + 128 * (200 + 4 + 2 * 40)
    assert Case(case.layer, 4, 128, 8).moved_bytes(64) == 40 * (100 + 2 * 4) + 128 * (200 + 4 + 2 * 40)
    assert Case(case.layer, 8, 128).moved_bytes(64) == 40 * (200 + 2) + 128 * 2 * (200 + 40)
    assert (group_of(8, 64), group_of(4, 64)) == (-1, 64)


def test_order():
    """Every case exactly once, and the telling ones of the 7B model's large layers first."""
    blocks = ordered(chosen([]), list(BITS), list(TOKENS), list(INT8_BITS))
    cases = [case for block in blocks for case in block.cases]
    int8 = [case for case in cases if case.activations == 8]
    assert len(cases) == len(set(cases)) == len(LAYERS) * len(BITS) * len(TOKENS) + len(int8)
    assert {(case.layer, case.bits, case.tokens) for case in int8} == {
        (layer, bits, tokens) for layer in LAYERS for bits in (4, 8) for tokens in (128, 256, 1024, 4096)
    }
    assert INT8_FROM == dispatch.INT8_FROM
    assert blocks[0] == Block(BY_LABEL["7b-gate_up"], 4, (1, 8, 16, 64))
    assert {block.layer.label for block in blocks[:6]} == {"7b-gate_up", "7b-down"}


def test_chosen():
    assert [layer.label for layer in chosen(["32b", "7b-down"])][:2] == ["7b-down", "32b-qkv"]
    assert {layer.model for layer in chosen(["down"])} == {"7b", "32b", "72b"}
    assert [block.tokens for block in ordered(chosen(["7b-o"]), [2], [3, 8], [8])] == [(8,), (3,)]
    assert ordered(chosen(["7b-o"]), [], [127, 300, 128], [4]) == [Block(BY_LABEL["7b-o"], 4, (300, 128), 8)]


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
    assert target_of(Case(BY_LABEL[label], bits, tokens, 8)) is None


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


def test_report_of_int8():
    """Tables of 8-bit activations come last, with ours and cuBLAS at 16 bits beside; no figure crosses tables."""
    found = [
        speed("vlmq-int8", "7b-o", 8, 128, 10.0),
        speed("vlmq", "7b-o", 8, 128, 15.0),
        speed("cublas", "7b-o", 16, 128, 20.0),
        speed("cutlass", "7b-o", 8, 128, 9.0),
        speed("int_mm", "7b-o", 8, 128, 12.5),
        speed("vlmq-int8", "7b-o", 4, 128, 11.0),
        speed("vlmq", "7b-o", 4, 128, 22.0),
        speed("marlin", "7b-o", 4, 128, 33.0),
        speed("vlmq", "7b-o", 4, 8, 3.0),
    ]
    text = report([{"kind": "machine"} | MACHINE, *found])
    head, *tables = text.split("\n## ")
    assert speed_report.INT8_NOTES in head and [table.split("\n")[0] for table in tables] == ["W4", "W8A8", "W4A8"]
    w4, w8a8, w4a8 = (table.splitlines()[2:] for table in tables)
    assert w4[0] == "| layer | M | us | GB/s | share | cuBLAS, us | Marlin, us | target |"
    assert w4[2:4] == [
        "| 7b-o | 8 | 3.0 | 2,000 | 50% |  |  | met |",
        "| 7b-o | 128 | 22.0 | 2,000 | 50% | 20.0 (0.91 x) | 33.0 (1.50 x) | 0.91 x cuBLAS, wanted 1.1 |",
    ]
    assert w8a8[0].endswith("| share | vlmq, us | cuBLAS, us | vLLM CUTLASS int8, us | torch._int_mm, us |")
    assert w8a8[2] == (
        "| 7b-o | 128 | 10.0 | 2,000 | 50% | 15.0 (1.50 x) | 20.0 (2.00 x) | 9.0 (0.90 x) | 12.5 (1.25 x) |"
    )
    assert w4a8 == [
        "| layer | M | us | GB/s | share | vlmq, us | cuBLAS, us |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 7b-o | 128 | 11.0 | 2,000 | 50% | 22.0 (2.00 x) | 20.0 (1.82 x) |",
    ]
    assert speed_report.INT8_NOTES not in report([{"kind": "machine"} | MACHINE, *found[1:5], found[6]])


def test_report_of_first_minute():
    text = report([{"kind": "machine"} | MACHINE, speed("cublas", "7b-o", 16, 1, 6.25)])
    assert "A kernel that does nothing takes 1.25 us" in text and "Left out" not in text
    assert "| 7b-o | 1 | 6.2 | 2,000 | 50% | 12 |" in text
