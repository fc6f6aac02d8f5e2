"""Checkpoints that GPTQModel, AutoRound and llm-compressor wrote, served with `--quantization vlmq`, answer as the same
models dequantised. That the weights are those of their packages is shown in tests/plugin/test_foreign.py."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import engines
from foreign_checkpoints import read, restore, weight_of

pytest.importorskip("vllm", reason="vLLM is not installed")

TOLERANCE = 0.02  # as in test_serving_families.py
NAMES = ("gptq-mixed", "gptq-2bit-asym", "round-2bit-asym-own", "packed-3bit-tens-asym", "packed-mixed")


def dequantize(folder: Path, out: Path) -> None:
    """The checkpoint's 16-bit twin."""
    shutil.copytree(folder, out)
    packing, modules = read(folder)
    tensors = load_file(folder / "model.safetensors")
    for module, info in modules.items():
        weight = weight_of(folder, module, packing, info)
        for name in [name for name in tensors if name.rpartition(".")[0] == module and not name.endswith(".bias")]:
            del tensors[name]
        tensors[f"{module}.weight"] = weight.dequantize(weight.scale.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> dict:
    root, jobs = tmp_path_factory.mktemp("foreign"), []
    names = engines.asked_for(request, "name")
    for name in names:
        restore(name, root / name)
        dequantize(root / name, root / f"{name}-twin")
        jobs.append(engines.Job(str(root / name), {"dtype": "float16", "quantization": "vlmq"}))
        jobs.append(engines.Job(str(root / f"{name}-twin"), {"dtype": "float16"}))
    found = engines.run(jobs, timeout=900)
    return {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(names)}


FAST = ("gptq-mixed", "packed-3bit-tens-asym")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_answers_equal_the_twins(answers, name):
    assert engines.difference(*answers[name]) < TOLERANCE
