"""What `vllm serve` says about a model that cannot be served with vlmq: one line at the end, and a non-zero exit."""

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from answers import run

pytest.importorskip("vllm", reason="vLLM is not installed")


def last_line(folder: Path) -> str:
    """The last line of a `vllm serve` that must fail."""
    vllm = Path(sys.executable).with_name("vllm")
    done = run([str(vllm), "serve", str(folder), "--quantization", "vlmq", "--max-model-len", "256"], 300)
    assert done.returncode != 0
    return done.stdout.strip().splitlines()[-1]


def test_unquantised_model_is_not_served_in_silence(demo_model):
    last = last_line(demo_model)
    assert f"--quantization vlmq was given, but {demo_model} is not quantised" in last
    assert "vlmq quantize" in last


def test_missing_tensor_is_named_before_anything_is_built(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "model")
    path = folder / "model-00003-of-00005.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight_scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    last = last_line(folder)
    assert f"{folder} cannot be served: model.layers.2.mlp.up_proj.weight_scale is in no file" in last
