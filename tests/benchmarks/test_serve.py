"""The serve benchmark: how servers start, end and fail, with fakes in their place, and once all of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmark_modules import FOLDER
from vlmq_vllm.format import WeightFormat

psutil = pytest.importorskip("psutil", reason="comes with vLLM")
from benchmarks.journal import Journal  # noqa: E402
from benchmarks.serve import checkpoints, machine, server_process, throughput, throughput_report, variants  # noqa: E402

FORMAT = WeightFormat(4, 64, True)
LOAD = variants.Load(3, 2, float("inf"), (112, 84), 16, 5, 7)

FAKE = """\
#!{python}
import http.server, os, subprocess, sys, time
if "bad" in sys.argv[2]:
    print("ValueError: no such model")
    sys.exit(3)
if "slow" in sys.argv[2]:
    time.sleep(60)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, lambda *a: 0); time.sleep(60)"])
if os.environ["VLLM_LOGGING_LEVEL"] == "INFO":
    print("Using WrongLinearKernel for mixed-precision linear", flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """In place of vLLM a server that is healthy at once and has a child that does not end when it is asked to."""
    script = tmp_path / "vllm"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return lambda model, patience=20.0: server_process.serve(model, [], tmp_path / "log", patience)


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
        before, begun = server_process.Clock.now(server), time.process_time()
        while time.process_time() < begun + 0.5:
            pass
        after = server_process.Clock.now(server)
    spent = after.others_since(before) * (after.at - before.at)
    assert spent > 0.4  # the system counts in hundredths, of the server's two processes as well


def test_not_started(fake):
    with pytest.raises(RuntimeError, match="ended with code 3: ValueError: no such model"), fake(Path("bad")):
        pass
    with pytest.raises(RuntimeError, match="not healthy after 1 s: it said nothing"), fake(Path("slow"), 1.0):
        pass


def test_failures_go_on(fake, tmp_path, monkeypatch):
    """A variant with another kernel than its own has no figures, one that does not start neither; others have.

    Which kernel it is stands in vLLM's log, however quiet the user's vLLM is.
    """
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(variants.Bench, "_load", lambda bench, model, port: {"requests_per_second": 2.0})
    models = checkpoints.Models(tmp_path, tmp_path / "good", None, None, FORMAT)
    monkeypatch.setattr(models, "folder", lambda bits, stock: tmp_path / ("bad" if bits == 3 else "good"))
    journal = Journal(tmp_path / "found.jsonl", throughput_report.report)
    journal.add(kind="machine", **machine.machine(tmp_path, None, None, FORMAT, LOAD, False))
    bench = variants.Bench(LOAD, (), tmp_path, 20.0, 20.0)
    throughput.compare(bench, models, ["marlin-w4", "w3", "w2"], 2, journal)
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

    monkeypatch.setattr(variants.Bench, "_load", load)
    (tmp_path / "good").mkdir()
    with pytest.raises(RuntimeError, match="ended under the load: MemoryError: too much"):
        variants.Bench(LOAD, (), tmp_path, 20.0, 20.0).run("bf16", tmp_path / "good")


SMALL = ["--serve-args=--enforce-eager --max-model-len 1024 --max-num-seqs 4", "--concurrency", "2"]
COMMAND = [sys.executable, f"{FOLDER}/serve/throughput.py", "--requests", "4", "--output-tokens", "4", *SMALL]


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
