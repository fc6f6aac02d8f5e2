"""Runs a real `vllm serve` for as long as a `with` block lasts, and asks it about pictures with the openai client."""

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from openai import OpenAI

SMALL = ("--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager", "--dtype", "bfloat16")
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextlib.contextmanager
def serve(model: Path, *options: str, log: Path, patience: float = 300) -> Iterator[OpenAI]:
    """Start `vllm serve MODEL OPTIONS`, wait until it is healthy, yield a client; stop it whatever happens.

    Its output goes to `log`. Raises RuntimeError with the log's end when it dies or takes more than `patience` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", model, *options, *SMALL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | QUIET,
            start_new_session=True,  # a process group of its own, so that its workers can be stopped with it
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log, patience)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
    finally:
        _stop(process)


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve was not healthy after {patience:.0f} s:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to end, and kill what is left of its process group."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def ask_all(client: OpenAI, questions: list[tuple], parallel: int = 8) -> list[str]:
    """Greedy answers to (PIL image, question text) pairs, in order, `parallel` requests at a time."""

    def ask(pair: tuple) -> str:
        image, text = pair
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        reply = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=16
        )
        return reply.choices[0].message.content

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(ask, questions))
