"""Runs a real `vllm serve` for as long as a `with` block lasts, and reads what its log tells.

The memory of weights and the room for a KV cache are what the engine says of itself. On a CPU it says nothing of the
weights; there the memory that its processes share out among them (proportional set size) is taken.
"""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

NAME = "benchmark"  # under which the model is served
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
TALKATIVE = {"VLLM_LOGGING_LEVEL": "INFO"}  # the figures below stand in its log, however quiet the caller wants vLLM
# Answers of one request must not be found in a cache by the next one, in a cache of prefixes or of pictures.
COMMON = ("--dtype", "bfloat16", "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
FACTS = {
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "kv_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "kv_tokens": r"KV cache size: ([\d,]+) tokens",
}
KERNEL = re.compile(r"Using (\w+LinearKernel) for (?:CompressedTensorsWNA16|mixed-precision linear)")
ERROR = re.compile(r"(?:ERROR .*?\] |^)(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt): .+)", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """seconds: from its start until it was healthy."""

    process: subprocess.Popen
    port: int
    seconds: float

    def resident(self) -> int:
        """Bytes in memory of all its processes; pages that several of them share count once."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def cpu_seconds(self) -> float:
        """Processor time that its processes have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]


@dataclass(frozen=True)
class Clock:
    """A moment: seconds, and processor seconds that everything else on this machine has used by then.

    Ours are the server's and those of children that have ended, such as the one that makes the load.
    """

    at: float
    others: float

    @classmethod
    def now(cls, server: Server) -> "Clock":
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system  # a guest's time is in user and nice
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), busy - server.cpu_seconds() - ended.ru_utime - ended.ru_stime)

    def others_since(self, before: "Clock") -> float:
        """Cores that others kept busy, on average."""
        return max(0.0, (self.others - before.others) / (self.at - before.at))


@contextlib.contextmanager
def serve(model: Path, options: list[str], log: Path, patience: float) -> Iterator[Server]:
    """Start `vllm serve MODEL`, wait until it is healthy, yield it; stop it whatever happens.

    Its output goes to `log`. Raises RuntimeError with the first error in it when it dies or takes more than `patience`
    seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", model, *COMMON, *options]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", NAME]
    began = time.monotonic()
    process = None
    try:
        with log.open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | QUIET | TALKATIVE,
                start_new_session=True,  # a process group of its own: Ctrl-C is ours, and its workers end with it
            )
        _wait_until_healthy(process, port, log, patience)
        yield Server(process, port, time.monotonic() - began)
    finally:
        if process is not None:
            _stop(process)


def read_log(text: str) -> dict:
    """Numbers of `FACTS` as far as they are told, "kernels" that vLLM chose, and lines of the vlmq plugin."""
    found: dict = {}
    for name, pattern in FACTS.items():
        if told := re.search(pattern, text):
            number = float(told[1].replace(",", ""))
            found[name] = int(number) if name == "kv_tokens" else number
    found["kernels"] = sorted(set(KERNEL.findall(text)))
    found["plugin"] = re.findall(r"\] (vlmq: .+)", text)
    return found


def first_error(text: str) -> str:
    """The root of what went wrong: what is raised later is raised because of it."""
    found = ERROR.search(text)
    lines = text.strip().splitlines() or ["it said nothing"]
    return found[1] if found else lines[-1]


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with code {process.returncode}: {first_error(log.read_text())}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve was not healthy after {patience:.0f} s: {first_error(log.read_text())}")


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to end, and kill what is left of its process group, even when Ctrl-C is pressed once more."""
    try:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
