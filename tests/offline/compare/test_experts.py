"""`vlmq compare` of a mixture of experts through transformers, which keeps them in other tensors than the files."""

import json

import pytest
from PIL import Image

from family_models import build
from mixed_formats import quantize_mixed
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.compare.run import compare
from vlmq_vllm.offline.settings.compare import CompareSettings


@pytest.fixture
def evaluation(tmp_path):
    """Two chats, one with a picture."""
    Image.effect_noise((56, 56), 64).convert("RGB").save(tmp_path / "0.png")
    asked = [[{"type": "image", "image": "0.png"}], []]
    chats = [
        [
            {"role": "user", "content": [*seen, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "nothing"},
        ]
        for seen in asked
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return path


def test_figures_are_those_of_the_dequantised_twin(evaluation, tmp_path):
    model, packed, twin = (tmp_path / name for name in ("model", "packed", "twin"))
    build("qwen3_vl_moe", model)
    quantize_mixed(model, packed)
    dequantize(packed, twin)
    settings = CompareSettings(dtype="float32", device="cpu", max_new_tokens=4)
    report, expected = (compare(str(model), folder, evaluation, settings) for folder in (packed, twin))
    assert report["rows"] == expected["rows"] and len(report["rows"]) == 2
    assert all(row["kl"] > 1e-4 for row in report["rows"])
