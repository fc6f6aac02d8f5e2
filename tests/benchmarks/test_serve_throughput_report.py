"""The serve benchmark without a server: the arithmetic of its report, what it reads in logs, its arguments."""

import sys
from pathlib import Path

import pytest

from vlmq_vllm.format import WeightFormat

pytest.importorskip("psutil", reason="comes with vLLM")
from benchmarks.journal import Journal
from benchmarks.serve import machine, server_process, throughput, throughput_report, variants

FORMAT = WeightFormat(4, 64, True)
LOAD = variants.Load(3, 2, float("inf"), (112, 84), 16, 5, 7)
RESULT = {
    "completed": 3,
    "failed": 0,
    "errors": ["", "", ""],
    "output_lens": [5, 5, 5],
    "duration": 1.5,
    "total_input_tokens": 70,
    "request_throughput": 2.0,
    "output_throughput": 10.0,
    **{f"p{p}_{metric}_ms": p + add for p in (50, 90, 99) for metric, add in (("ttft", 0.5), ("tpot", 0.25))},
}


def run_line(variant: str, number: int, **figures) -> dict:
    kept = {"requests_per_second": 10.0, "output_tokens_per_second": 320.0, "file_bytes": 8e6}
    kept |= {"kernels": [], "others_cores": 0.25}
    return {"kind": "run", "variant": variant, "round": number} | kept | figures


def machine_line() -> dict:
    return {"kind": "machine", **machine.machine(Path("/x/some-model"), None, None, FORMAT, LOAD, False)}


def test_ratios():
    """Of each round to bf16 in the same round, then the median: a machine that slows down does not show."""
    lines = [run_line("w4", i, requests_per_second=speed) for i, speed in ((1, 30.0), (2, 15.0), (3, 10.0))]
    lines += [run_line(variants.DENSE, i, requests_per_second=speed) for i, speed in ((1, 20.0), (2, 10.0))]
    runs = throughput_report.by_variant(lines)
    assert list(runs) == ["bf16", "w4"]
    assert throughput_report.ratio(runs, "w4", "requests_per_second") == 1.5
    assert throughput_report.ratio(runs, "w4", "weights_gib") is None
    text = throughput_report.report([machine_line(), *lines])
    assert "| w4 | 3 | 15.00 (1.50 x) | 10.00 - 30.00 | 320.0 (1.00 x) |" in text
    assert "| bf16 | 2 | 15.00 | 10.00 - 20.00 | 320.0 |" in text
    assert "files, MB" in text and "GiB" not in text and "Left out" not in text


def test_memory_and_left_out():
    """Columns without a figure are left out; a variant that failed later keeps its runs; one reason is told once."""
    lines = [run_line("bf16", 1, weights_gib=15.5, kv_tokens=100_000)]
    lines += [run_line("w2", 1, weights_gib=3.1, kv_tokens=400_000)]
    lines += [{"kind": "failed", "variant": name, "round": 2, "reason": "gone"} for name in ("w2", "w3")]
    text = throughput_report.report([machine_line() | {"gpu": True}, *lines])
    assert "| w2 | 8.0 (1.00 x) | 3.10 (0.20 x) | 400,000 (4.00 x) |  |" in text
    assert "* w2 failed: `gone`\n* w3 failed: `gone`" in text and "VLLM_CPU" not in text


def test_report_without_runs():
    text = throughput_report.report([machine_line(), {"kind": "skipped", "variant": "w4", "reason": "no GPU"}])
    assert "some-model" in text and "/x" not in text and "## Speed" not in text and "w4 skipped: `no GPU`" in text


def test_figures():
    found = variants.figures(RESULT, LOAD)
    assert (found["requests_per_second"], found["ttft_p99_ms"], found["tpot_p50_ms"]) == (2.0, 99.5, 50.25)
    with pytest.raises(RuntimeError, match="1 of 3 requests failed: ValueError: too long"):
        variants.figures(RESULT | {"completed": 2, "failed": 1, "errors": ["", "ValueError: too long", ""]}, LOAD)
    with pytest.raises(RuntimeError, match="2 answers have another length than the 5"):
        variants.figures(RESULT | {"output_lens": [5, 1, 4]}, LOAD)


def test_load():
    given = LOAD.arguments()
    assert given[given.index("--random-mm-bucket-config") + 1] == "{(84, 112, 1): 1.0}"  # height, width, frames
    assert given[given.index("--max-concurrency") + 1] == "2" and given[given.index("--num-warmups") + 1] == "2"


LOG = """\
(Worker pid=1) INFO 11-21 10:00:00 [cuda.py:1] Using MarlinLinearKernel for CompressedTensorsWNA16
(Worker pid=1) INFO 11-21 10:00:00 [cuda.py:1] Using OtherLinearKernel for nothing of ours
(Worker pid=1) INFO 11-21 10:00:01 [linear.py:9] vlmq: 28 of 28 quantised weights in this process
(Worker pid=1) INFO 11-21 10:00:02 [runner.py:2] Model loading took 5.25 GiB memory and 1.234567 seconds
(Worker pid=1) INFO 11-21 10:00:03 [worker.py:3] Available KV cache memory: 60.5 GiB
(Engine pid=1) INFO 11-21 10:00:03 [utils.py:4] GPU KV cache size: 1,132,816 tokens, Maximum concurrency: 34.57x
"""
ERRORS = """\
(Worker pid=1) ERROR 11-21 10:00:04 [executor.py:5]     return a
(Worker pid=1) ERROR 11-21 10:00:04 [executor.py:5] vllm.oops.OwnError: weight x is missing
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_log():
    found = server_process.read_log(LOG)
    assert (found["weights_gib"], found["kv_gib"], found["kv_tokens"]) == (5.25, 60.5, 1132816)
    assert found["kernels"] == ["MarlinLinearKernel"]
    assert found["plugin"] == ["vlmq: 28 of 28 quantised weights in this process"]
    assert server_process.read_log("") == {"kernels": [], "plugin": []}
    assert server_process.first_error(LOG + ERRORS) == "OwnError: weight x is missing"
    assert server_process.first_error("one\ntwo\n") == "two"


def test_others():
    """Of three seconds, one and a half of a core."""
    before, after = server_process.Clock(10.0, 100.0), server_process.Clock(13.0, 101.5)
    assert after.others_since(before) == 0.5
    assert server_process.Clock(11.0, 99.99).others_since(before) == 0.0  # the system counts in hundredths


def test_chosen():
    journal = Journal(None, throughput_report.report)
    assert throughput.chosen(["bf16", "marlin-w4", "vllm-w4"], False, journal) == ["bf16", "vllm-w4"]
    assert [(line["kind"], line["variant"]) for line in journal.lines] == [("skipped", "marlin-w4")]
    assert throughput.chosen(["bf16", "marlin-w4"], True, journal) == ["bf16", "marlin-w4"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("--shape 8b", "invalid choice"),
        ("--requests 0", "at least 1"),
        ("--layers 2", "--layers goes with --shape"),
        ("--group-size 48", "multiples of"),
        ("--model /nowhere", "give the folder"),
        ("--variants w5", "invalid choice"),
        ("--out /nowhere/found.jsonl", "/nowhere is no folder"),
    ],
)
def test_refused_arguments(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        throughput.main()
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_arguments():
    args = throughput.parser().parse_args(["--image-size", "448x224", "--serve-args=--max-num-seqs 8 --enforce-eager"])
    assert args.image_size == (448, 224) and args.serve_args == ["--max-num-seqs", "8", "--enforce-eager"]
    assert throughput.parser().parse_args(["--image-size", "448"]).image_size == (448, 448)
