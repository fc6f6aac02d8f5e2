"""The serve benchmark: the arithmetic of its report, what it reads in logs, how servers end, and once all of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_modules import FOLDER, load

from vlmq_vllm.format import WeightFormat

psutil = pytest.importorskip("psutil", reason="comes with vLLM")
serve, serve_machine, serve_models, serve_report, serve_run, serve_server = load(
    "serve", "serve_machine", "serve_models", "serve_report", "serve_run", "serve_server"
)

FORMAT = WeightFormat(4, 64, True)
LOAD = serve_run.Load(3, 2, float("inf"), (112, 84), 16, 5, 7)
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
    return {"kind": "machine", **serve_machine.machine(Path("/x/some-model"), None, None, FORMAT, LOAD, False)}


def test_ratios():
    """Of each round to bf16 in the same round, then the median: a machine that slows down does not show."""
    lines = [run_line("w4", i, requests_per_second=speed) for i, speed in ((1, 30.0), (2, 15.0), (3, 10.0))]
    lines += [run_line(serve_run.DENSE, i, requests_per_second=speed) for i, speed in ((1, 20.0), (2, 10.0))]
    runs = serve_report.by_variant(lines)
    assert list(runs) == ["bf16", "w4"]
    assert serve_report.ratio(runs, "w4", "requests_per_second") == 1.5
    assert serve_report.ratio(runs, "w4", "weights_gib") is None
    text = serve_report.report([machine_line(), *lines])
    assert "| w4 | 3 | 15.00 (1.50 x) | 10.00 - 30.00 | 320.0 (1.00 x) |" in text
    assert "| bf16 | 2 | 15.00 | 10.00 - 20.00 | 320.0 |" in text
    assert "files, MB" in text and "GiB" not in text and "Left out" not in text


def test_memory_and_left_out():
    """Columns without a figure are left out; a variant that failed later keeps its runs; one reason is told once."""
    lines = [run_line("bf16", 1, weights_gib=15.5, kv_tokens=100_000)]
    lines += [run_line("w2", 1, weights_gib=3.1, kv_tokens=400_000)]
    lines += [{"kind": "failed", "variant": name, "round": 2, "reason": "gone"} for name in ("w2", "w3")]
    text = serve_report.report([machine_line() | {"gpu": True}, *lines])
    assert "| w2 | 8.0 (1.00 x) | 3.10 (0.20 x) | 400,000 (4.00 x) |  |" in text
    assert "* w2 failed: `gone`\n* w3 failed: `gone`" in text and "VLLM_CPU" not in text


def test_report_without_runs():
    text = serve_report.report([machine_line(), {"kind": "skipped", "variant": "w4", "reason": "no GPU"}])
    assert "some-model" in text and "/x" not in text and "## Speed" not in text and "w4 skipped: `no GPU`" in text


def test_figures():
    found = serve_run.figures(RESULT, LOAD)
    assert (found["requests_per_second"], found["ttft_p99_ms"], found["tpot_p50_ms"]) == (2.0, 99.5, 50.25)
    with pytest.raises(RuntimeError, match="1 of 3 requests failed: ValueError: too long"):
        serve_run.figures(RESULT | {"completed": 2, "failed": 1, "errors": ["", "ValueError: too long", ""]}, LOAD)
    with pytest.raises(RuntimeError, match="2 answers have another length than the 5"):
        serve_run.figures(RESULT | {"output_lens": [5, 1, 4]}, LOAD)


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
    found = serve_server.read_log(LOG)
    assert (found["weights_gib"], found["kv_gib"], found["kv_tokens"]) == (5.25, 60.5, 1132816)
    assert found["kernels"] == ["MarlinLinearKernel"]
    assert found["plugin"] == ["vlmq: 28 of 28 quantised weights in this process"]
    assert serve_server.read_log("") == {"kernels": [], "plugin": []}
    assert serve_server.first_error(LOG + ERRORS) == "OwnError: weight x is missing"
    assert serve_server.first_error("one\ntwo\n") == "two"


FAKE = """\
#!{python}
import http.server, subprocess, sys, time
if "bad" in sys.argv[2]:
    print("ValueError: no such model")
    sys.exit(3)
if "slow" in sys.argv[2]:
    time.sleep(60)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, lambda *a: 0); time.sleep(60)"])
print("Using WrongLinearKernel for mixed-precision linear", flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


def test_others():
    """Of three seconds, one and a half of a core."""
    before, after = serve_server.Clock(10.0, 100.0), serve_server.Clock(13.0, 101.5)
    assert after.others_since(before) == 0.5
    assert serve_server.Clock(11.0, 99.99).others_since(before) == 0.0  # the system counts in hundredths


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """In place of vLLM a server that is healthy at once and has a child that does not end when it is asked to."""
    script = tmp_path / "vllm"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return lambda model, patience=20.0: serve_server.serve(model, [], tmp_path / "log", patience)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_stopped(fake, error):
    """Whatever ends the block, nothing of the server is left."""
    with pytest.raises(error), fake(Path("good")) as server:
        group = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
        assert len(group) == 2 and server.resident() > 1 << 20 and server.seconds > 0
        raise error
    gone, alive = psutil.wait_procs(group, 5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_others_of_a_server(fake):
    """This process is neither the server nor a child of the benchmark that has ended: its work is that of others."""
    with fake(Path("good")) as server:
        before, begun = serve_server.Clock.now(server), time.process_time()
        while time.process_time() < begun + 0.5:
            pass
        after = serve_server.Clock.now(server)
    spent = after.others_since(before) * (after.at - before.at)
    assert spent > 0.4  # the system counts in hundredths, of the server's two processes as well


def test_not_started(fake):
    with pytest.raises(RuntimeError, match="ended with code 3: ValueError: no such model"), fake(Path("bad")):
        pass
    with pytest.raises(RuntimeError, match="not healthy after 1 s: it said nothing"), fake(Path("slow"), 1.0):
        pass


def test_failures_go_on(fake, tmp_path, monkeypatch):
    """A variant with another kernel than its own has no figures, one that does not start neither; others have."""
    monkeypatch.setattr(serve_run.Bench, "_load", lambda bench, model, port: serve_run.figures(RESULT, LOAD))
    models = serve_models.Models(tmp_path, tmp_path / "good", None, None, FORMAT)
    monkeypatch.setattr(models, "folder", lambda bits, stock: tmp_path / ("bad" if bits == 3 else "good"))
    journal = serve_report.Journal(tmp_path / "found.jsonl")
    journal.add(**machine_line())
    bench = serve_run.Bench(LOAD, (), tmp_path, 20.0, 20.0)
    serve.compare(bench, models, ["marlin-w4", "w3", "w2"], 2, journal)
    kinds = [(line["kind"], line["variant"]) for line in journal.lines[1:]]
    assert kinds == [("failed", "marlin-w4"), ("failed", "w3"), ("run", "w2"), ("run", "w2")]
    assert "another kernel than MarlinLinearKernel: WrongLinearKernel" in journal.lines[1]["reason"]
    assert [json.loads(line) for line in journal.out.read_text().splitlines()] == journal.lines
    assert "| w2 | 2 | 2.00 |" in journal.out.with_suffix(".md").read_text()


def test_server_ends_under_load(fake, tmp_path, monkeypatch):
    """The reason is the server's, not that nobody answered."""

    def load(bench, model, port):
        with (tmp_path / "bf16.log").open("a") as log:
            print("MemoryError: too much", file=log)
        psutil.Process().children()[0].kill()
        time.sleep(0.5)
        raise RuntimeError("3 of 3 requests failed: ClientConnectorError: Cannot connect")

    monkeypatch.setattr(serve_run.Bench, "_load", load)
    (tmp_path / "good").mkdir()
    with pytest.raises(RuntimeError, match="ended under the load: MemoryError: too much"):
        serve_run.Bench(LOAD, (), tmp_path, 20.0, 20.0).run("bf16", tmp_path / "good")


def test_chosen():
    journal = serve_report.Journal(None)
    assert serve.chosen(["bf16", "marlin-w4", "vllm-w4"], False, journal) == ["bf16", "vllm-w4"]
    assert [(line["kind"], line["variant"]) for line in journal.lines] == [("skipped", "marlin-w4")]
    assert serve.chosen(["bf16", "marlin-w4"], True, journal) == ["bf16", "marlin-w4"]


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
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        serve.main()
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_arguments():
    args = serve.parser().parse_args(["--image-size", "448x224", "--serve-args=--max-num-seqs 8 --enforce-eager"])
    assert args.image_size == (448, 224) and args.serve_args == ["--max-num-seqs", "8", "--enforce-eager"]
    assert serve.parser().parse_args(["--image-size", "448"]).image_size == (448, 448)


SMALL = ["--serve-args=--enforce-eager --max-model-len 1024 --max-num-seqs 4", "--concurrency", "2"]
COMMAND = [sys.executable, f"{FOLDER}/serve.py", "--requests", "4", "--output-tokens", "4", *SMALL]


@pytest.mark.slow
def test_whole_benchmark(tmp_path):
    """Real servers of 16, 3 and 4 bits, of vlmq and of stock vLLM, and a peer that needs a GPU."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    out = tmp_path / "found.jsonl"
    names = ["bf16", "w3", "vllm-w4"] + ([] if torch.cuda.is_available() else ["machete-w4"])
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*COMMAND, "--out", out, "--variants", *names], env=os.environ | more, timeout=900)
    assert done.returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    runs = {line["variant"]: line for line in lines if line["kind"] == "run"}
    assert list(runs) == ["bf16", "w3", "vllm-w4"]
    assert [line["variant"] for line in lines if line["kind"] == "skipped"] == names[3:]
    for line in runs.values():
        # answers are counted by the server, and the first tokens of all take no longer than the whole load
        assert line["output_tokens_per_second"] * line["seconds"] == pytest.approx(16)
        assert 0 < line["ttft_p50_ms"] <= line["ttft_p99_ms"] < 1000 * line["seconds"]
        assert line["kv_tokens"] > 1024 and line["resident_bytes"] > 1 << 28
    assert len({line["input_tokens"] for line in runs.values()}) == 1
    assert runs["w3"]["plugin"] and not runs["bf16"]["plugin"] and runs["vllm-w4"]["kernels"]
    assert runs["w3"]["file_bytes"] < runs["vllm-w4"]["file_bytes"] < runs["bf16"]["file_bytes"]
    assert "| w3 | 1 |" in out.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, number):
    """A benchmark that is interrupted leaves no server and no checkpoint behind."""
    running = psutil.Popen([*COMMAND, "--work", tmp_path, "--variants", "bf16"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not running.children() and time.monotonic() < deadline:
        time.sleep(0.2)
    servers = running.children(recursive=True)
    running.send_signal(number)
    assert running.wait(60) != 0 and servers
    gone, alive = psutil.wait_procs(servers, 5)
    assert not alive and not list(tmp_path.iterdir())
