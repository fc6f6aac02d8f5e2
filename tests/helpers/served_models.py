"""The models of `family_models.py` as vlmq checkpoints that vLLM can serve, in float16, in a mixture of formats.

2, 3, 4 and 8 bits side by side in the decoder's fused layers, one linear left alone, vision tower and connector at 4
bits wherever vLLM takes packed weights there, and a quantised head where it is not tied to the embeddings. All experts
of a layer have one format for gate and up and one for down. Weights are rounded to nearest. Every token goes to all
experts, each with its weight: which of two random experts is second best is decided by the last bit now and then, and a
token that goes elsewhere has other log-probabilities (seen: by 0.15). tests/plugin/layers/test_experts.py has real
choices.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import family_models
from mixed_formats import DEFAULT, quantize_mixed
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import find_units
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.unserved import why_unserved

DECODER = (
    WeightFormat(4, 64, True),
    WeightFormat(3, 32, False),
    WeightFormat(2, 64, True),
    WeightFormat(3, -1, True),
    WeightFormat(8, 32, True),
    WeightFormat(2, 32, False),
    WeightFormat(4, 32, False),
    WeightFormat(3, 64, True),
)
ROW = WeightFormat(4, -1, False)
VISION = (DEFAULT, WeightFormat(4, 64, False), WeightFormat(4, -1, True))
EXPERTS = {"gate_proj": WeightFormat(3, 32, False), "up_proj": WeightFormat(3, 32, False), "down_proj": DEFAULT}
ALONE = re.compile(r"\.1\.self_attn\.k_proj$")


def build(name: str, folder: Path, ranks: int = 1) -> tuple[Path, Path]:
    """The family `name` in float16 in `folder`/source, and quantised in `folder`/quantised, so that every weight can be
    cut over `ranks`."""
    source, out = folder / "source", folder / "quantised"
    family_models.build(name, source)
    path = source / "model.safetensors"
    tensors = {key: tensor.half() for key, tensor in load_file(path).items()}
    if name == "gemma3":  # served in bfloat16, whose steps are coarse at its large logits: a final norm of a quarter
        tensors["language_model.model.norm.weight"] -= 0.75
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((source / "config.json").read_text().replace('"bfloat16"', '"float16"'))
    if name == "qwen3_vl_moe":
        config["text_config"]["num_experts_per_tok"] = config["text_config"]["num_local_experts"]
    (source / "config.json").write_text(json.dumps(config))
    quantize_mixed(source, out, _choice(Source(source), ranks))
    return source, out


def _choice(source: Source, ranks: int) -> Callable[[int, str], WeightFormat | None]:
    """The format of a linear, for `quantize_mixed`."""
    formats = dict(_formats(source))

    def choose(index: int, name: str) -> WeightFormat | None:
        format, columns = formats.get(name), source.model.get_submodule(name).in_features
        return ROW if format and format.part(columns, columns // ranks) is None else format

    return choose


def _formats(source: Source):
    """(in-memory name, format) of every linear that is quantised."""
    settings = Settings(bits=3, group_size=32, vision_bits=4, connector_bits=4)
    turn = {"language": 0, "vision": 0, "connector": 0}
    for unit in find_units(source, settings):
        module = source.model.get_submodule(unit.module)
        for inner, linear in module.named_modules():
            name = f"{unit.module}.{inner}" if inner else unit.module
            if not isinstance(linear, torch.nn.Linear) or ALONE.search(name):
                continue
            if why_unserved(name, tuple(linear.weight.shape), source.config) or inner == "mlp.gate":
                continue
            choice = DECODER if unit.component == "language" else VISION
            format = choice[turn[unit.component] % len(choice)]
            turn[unit.component] += 1
            yield name, EXPERTS[inner.rpartition(".")[2]] if ".experts." in inner else format
    if "lm_head.weight" in source.places:
        yield "lm_head", WeightFormat(4, 32, False)
