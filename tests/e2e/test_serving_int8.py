"""A checkpoint with inputs of 8 bits, served by vLLM: it answers as transformers does with its rounding hooks.

No twin in 16 bits could stand for it. A channel of every norm is larger, so that activations have an outlier: without
one, rounding to 8 bits would hardly show. Both sides are float16.
"""

import engines
import pytest
import torch
from family_models import build
from rounded_models import quantize_rounded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

pytest.importorskip("vllm", reason="vLLM is not installed")

OUTLIER = 12.0
# An activation between two integers goes to either by float16's roundings before it, and is then a whole step off,
# which the outlier makes large: the two sides lie further apart than models that do not round (0.02). Seen: 0.21, and
# 1.37 with transformers' hooks taken away.
TOLERANCE = 0.4
TIE = 2 * TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    build("qwen2_vl", root / "model")
    path = root / "model" / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[5] *= OUTLIER
    save_file(tensors, path, {"format": "pt"})
    config = (root / "model" / "config.json").read_text().replace('"bfloat16"', '"float16"')
    (root / "model" / "config.json").write_text(config)
    quantize_rounded(root / "model", root / "packed")
    return root / "packed"


@torch.inference_mode()
def transformers_answers(folder, answers: list[dict], hooks: bool) -> list[dict]:
    """Log-probabilities of the prompts' tokens, and the best tokens behind those of `answers`."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16)
    for module in () if hooks else model.modules():
        module._forward_pre_hooks.clear()
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for number, answer in enumerate(answers):
        shown = [engines._picture(number)] if number else []
        content = [{"type": "image"} for _ in shown] + [{"type": "text", "text": engines.TEXTS[number]}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        asked = processor(text=[text], images=shown or None, return_tensors="pt").to(torch.float16)
        tokens = torch.tensor([[token for token, _, _ in answer["steps"]]])
        prompt = asked["input_ids"].shape[1]
        fill = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        for name, tensor in asked.items():
            if tensor.shape == (1, prompt):
                asked[name] = torch.cat([tensor, fill.get(name, torch.zeros_like(tokens))], dim=1)
        logs = model(**asked).logits[0].float().log_softmax(-1)
        ids = asked["input_ids"][0]
        best = logs[prompt - 1 : -1].topk(2)
        steps = zip(best.indices[:, 0].tolist(), best.values.tolist(), strict=True)
        found.append(
            {
                "prompt": logs[: prompt - 1].gather(1, ids[1:prompt, None])[:, 0].tolist(),
                "steps": [[token, first, first - second] for token, (first, second) in steps],
            }
        )
    return found


def test_answers_are_those_of_transformers(folder):
    (served,) = engines.run([engines.Job(str(folder), {"dtype": "float16"})], timeout=900)
    rounded, plain = (transformers_answers(folder, served, hooks) for hooks in (True, False))
    assert engines.difference(served, rounded, TIE) < TOLERANCE
    assert engines.difference(served, plain, TIE) > 2 * TOLERANCE
