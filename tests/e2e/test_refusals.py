"""What `vllm serve` says about a model that cannot be served with vlmq: one line at the end, and a non-zero exit."""

import sys
from pathlib import Path

import pytest
import tiny_model
from answers import run

pytest.importorskip("vllm", reason="vLLM is not installed")


def test_unquantised_model_is_not_served_in_silence(tmp_path):
    tiny_model.build(tmp_path / "model")
    vllm = Path(sys.executable).with_name("vllm")
    done = run([str(vllm), "serve", str(tmp_path / "model"), "--quantization", "vlmq", "--max-model-len", "256"], 300)
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert f"--quantization vlmq was given, but {tmp_path / 'model'} is not quantised" in last
    assert "vlmq quantize" in last
