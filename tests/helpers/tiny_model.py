"""A tiny random Qwen2-VL in two folders: as published, and quantised in a mixture of formats.

The quantised one has what makes serving hard: shards of one fused layer in different widths, one of them not quantised,
a fused tensor of the vision tower, rows that end in a part of a group, all widths, both grids, and a quantised head.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import MINMAX

DEFAULT = WeightFormat(4, 64, True)
FORMATS = {
    r"layers\.0\.self_attn\.q_proj": WeightFormat(4, 64, True),
    r"layers\.0\.self_attn\.k_proj": WeightFormat(3, 32, False),
    r"layers\.0\.self_attn\.v_proj": WeightFormat(2, 64, True),
    r"layers\.0\.self_attn\.o_proj": WeightFormat(8, 32, True),
    r"layers\.0\.mlp\.gate_proj": WeightFormat(3, 64, True),
    r"layers\.0\.mlp\.up_proj": WeightFormat(2, 32, False),
    r"layers\.0\.mlp\.down_proj": WeightFormat(3, 64, False),
    r"layers\.1\.self_attn\.[kv]_proj": WeightFormat(4, 32, False),
    r"layers\.1\.mlp\.(gate|up)_proj": WeightFormat(3, 32, True),
    r"layers\.1\.mlp\.down_proj": WeightFormat(2, 64, False),
    r"lm_head": WeightFormat(4, 32, False),
    r"visual\.blocks\.0\.attn\.qkv": WeightFormat(4, 64, False),
    r"visual\.blocks\.0\.attn\.proj": WeightFormat(3, 32, True),
    r"visual\.blocks\.0\.mlp\.fc1": WeightFormat(4, -1, True),
    r"visual\.blocks\.0\.mlp\.fc2": WeightFormat(4, 64, False),
    r"visual\.merger\.mlp\.0": WeightFormat(4, 128, True),
}


def build(folder: Path) -> None:
    """Write the random model with tokenizer and processor, under the names of the hub's files."""
    from architecture import build_model, build_processor, build_tokenizer, save

    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 128,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "initializer_range": 0.08,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    }
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 1, "hidden_size": 128, "initializer_range": 0.08}
    torch.manual_seed(0)
    save(build_model(tokenizer, text, vision), build_processor(tokenizer), folder)


def quantize(source: Path, folder: Path) -> None:
    """Round every weight that FORMATS names to the nearest code and write the checkpoint."""
    shutil.copytree(source, folder)
    tensors, overrides = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        format = _format_of(module) if name.endswith(".weight") else None
        if format is None:
            tensors[name] = tensor
            continue
        if format != DEFAULT:
            overrides[module] = format
        parts = round_to_nearest(tensor.float(), format, tensor.dtype, MINMAX).tensors()
        tensors.update({f"{module}.{part}": value for part, value in parts.items()})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QuantizationSpec(DEFAULT, overrides).to_dict({"name": "tests"})
    (folder / "config.json").write_text(json.dumps(config))


def _format_of(module: str) -> WeightFormat | None:
    return next((format for pattern, format in FORMATS.items() if re.search(pattern + "$", module)), None)
