"""What vLLM's engine can do beside answering, with a quantised model: each feature with the dequantised twin beside it.

Sleeping and waking is tested on a GPU only: vLLM's CPU worker ignores it. What needs several processes is in
test_serving_parallel.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import engines
import served_models
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

pytest.importorskip("vllm", reason="vLLM is not installed")

TOLERANCE = 0.02  # as in test_serving_families.py
CHOICES = ("red", "blue picture")
FEATURES = {
    "pictures and a film": {"pictures": (0, 1, 2), "video": True},
    "prefix cache": {"pictures": (1, 2), "times": 2, "prompt_logs": False, "options": {"block_size": 32}},
    "chunked prefill": {"options": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}},
    "reload": {"times": 2, "reload": True},
    "lora": {"lora": True},
    "structured": {"choices": CHOICES},
    "dummy": {"options": {"load_format": "dummy"}},
}
if torch.cuda.is_available():
    FEATURES |= {
        f"sleep {level}": {"times": 2, "sleep": level, "options": {"enable_sleep_mode": True}} for level in (1, 2)
    }


def write_adapter(folder: Path) -> str:
    """A random LoRA adapter for linears of the decoder, of rank 4, as PEFT stores it."""
    folder.mkdir()
    linears = {"self_attn.q_proj": (128, 128), "self_attn.o_proj": (128, 128), "mlp.down_proj": (208, 128)}
    tensors = {}
    for layer in range(3):
        for name, (columns, rows) in linears.items():
            prefix = f"base_model.model.model.language_model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(4, columns, dtype=torch.float16)
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, dtype=torch.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.split(".")[1] for name in linears]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "inference_mode": True}))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("features")
    _, quantized = served_models.build("qwen2_vl", root)
    dequantize(quantized, root / "twin")
    return quantized


@pytest.fixture(scope="module")
def answers(model) -> dict[str, tuple]:
    """By feature what the quantised model and its twin say; dummy weights have no twin."""
    jobs: list[engines.Job] = []
    asked: list[str] = []
    adapter = write_adapter(model.parent / "adapter")
    for name, settings in FEATURES.items():
        job = engines.Job("", **settings | ({"lora": adapter} if "lora" in settings else {}))
        job.options = job.options | {"dtype": "float16"}
        folders = (model,) if name == "dummy" else (model, model.parent / "twin")
        asked += [name] * len(folders)
        jobs += [replace(job, folder=str(folder)) for folder in folders]
    found = list(zip(asked, engines.run(jobs, timeout=900), strict=True))
    return {name: tuple(said for feature, said in found if feature == name) for name in FEATURES}


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "dummy"])
def test_answers_equal_the_twins(answers, feature):
    assert engines.difference(*answers[feature]) < TOLERANCE


def test_second_answers_come_from_the_prefix_cache(answers):
    quantized, _ = answers["prefix cache"]
    first, second = quantized[:2], quantized[2:]
    assert all(answer["cached"] > 0 for answer in second)
    assert engines.difference(first, second) < TOLERANCE


def test_chunks_change_nothing(answers):
    """The first two answers of both jobs are to the same questions."""
    assert engines.difference(answers["chunked prefill"][0], answers["pictures and a film"][0][:2]) < TOLERANCE


def test_reload_gives_the_same_weights(answers):
    quantized, _ = answers["reload"]
    assert engines.difference(quantized[:2], quantized[2:]) == 0


def test_adapter_changes_the_answers(answers):
    assert engines.difference(answers["lora"][0], answers["reload"][0][:2], tie=0) > 10 * TOLERANCE


def test_structured_output_is_one_of_the_choices(answers, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for answer in answers["structured"][0]:
        assert tokenizer.decode([token for token, *_ in answer["steps"]], skip_special_tokens=True) in CHOICES


def test_dummy_weights_give_numbers(answers):
    (quantized,) = answers["dummy"]
    assert not isinstance(quantized, str), quantized
    assert all(torch.tensor(answer["prompt"]).isfinite().all() for answer in quantized)
