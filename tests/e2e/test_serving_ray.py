"""A quantised model over two Ray nodes, by tensor and by pipeline parallelism, answers as its dequantised twin does in
one process.

Both nodes are on this machine, at addresses of its own. vLLM's CPU platform refuses Ray; `helpers/ray_on_cpu` changes
that in the processes of this test alone.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import engines
import served_models
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("ray", reason="Ray is not installed")

TOLERANCE = 0.02  # as in test_serving_parallel.py
FIRST, SECOND = "127.0.0.2", "127.0.0.3"
RAY = {"distributed_executor_backend": "ray", "dtype": "float16"}
WAYS = {
    "tensor": RAY | {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
    "pipeline": RAY
    | {"pipeline_parallel_size": 2, "enforce_eager": False}  # as in test_serving_parallel.py
    | {"compilation_config": {"mode": 2, "backend": "eager"}},
}


@contextmanager
def node(address: str, *how: str) -> Iterator[None]:
    """A Ray node at the address; all its processes end with it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", address, *how]
    command += ["--num-cpus", "2", "--num-gpus", "1", "--object-store-memory", str(100 << 20)]
    command += ["--disable-usage-stats"]
    environment = os.environ | engines.ENVIRONMENT | variables(address)
    running = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.terminate()  # it ends what it started
        with suppress(subprocess.TimeoutExpired):
            running.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def variables(address: str) -> dict[str, str]:
    path = str(Path(engines.__file__).with_name("ray_on_cpu"))
    return {
        "VLLM_HOST_IP": address,
        "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Two nodes; the variables of a process that uses them."""
    with socket.socket() as free:
        free.bind((FIRST, 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, ExitStack() as nodes:
        head = ("--head", "--port", str(port), "--temp-dir", folder, "--include-dashboard", "false")
        nodes.enter_context(node(FIRST, *head))
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), socket.create_connection((FIRST, port), 1):
                break
            assert time.monotonic() < deadline, "Ray's first node did not start"
            time.sleep(0.5)
        nodes.enter_context(node(SECOND, "--address", f"{FIRST}:{port}"))
        yield variables(FIRST) | {"RAY_ADDRESS": f"{FIRST}:{port}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[str, list]:
    """A quantised model's folder and what its twin answers."""
    root = tmp_path_factory.mktemp("ray")
    _, quantized = served_models.build("qwen2_vl", root, ranks=2)
    dequantize(quantized, root / "twin")
    [expected] = engines.run([engines.Job(str(root / "twin"), {"dtype": "float16"})], timeout=300)
    return str(quantized), expected


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_answers_equal_the_twins(way, cluster, model):
    folder, expected = model
    [found] = engines.run([engines.Job(folder, WAYS[way])], timeout=300, **cluster)
    assert engines.difference(found, expected) < TOLERANCE
