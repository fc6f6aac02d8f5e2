"""The unquantised model of every checkpoint here: a Qwen2-VL of 0.3 million parameters, as a folder like the hub's.

Two decoder layers, hidden 128, four heads of 32 and one for keys and values, inner size 64, so that groups of 32 and
64 fit; one vision block of width 32; untied head. Of every eight rows of a decoder linear two neighbours hold no
negative weight and one holds no positive one: their zero points, where there are any, are the smallest and the largest
code, where "zero minus one" as GPTQ files store it borrows from a neighbour or wraps around.
"""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

import family_models

TEXT = {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 1}
VISION = {"depth": 1, "num_heads": 1, "embed_dim": 32}


def build_base(folder: Path) -> None:
    """Write the model with its tokenizer and processor into `folder`."""
    usual = family_models.FAMILIES["qwen2_vl"]
    small = replace(usual, text=usual.text | TEXT, vision=usual.vision | VISION, tied=False)
    family_models.FAMILIES["qwen2_vl"] = small
    family_models.build("qwen2_vl", folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, weight in tensors.items():
        if name.startswith("model.") and name.endswith("_proj.weight"):
            weight[0::8] = weight[0::8].abs()
            weight[1::8] = weight[1::8].abs()
            weight[5::8] = -weight[5::8].abs()
    save_file(tensors, path, metadata={"format": "pt"})
