"""Models of `family_models.py` whose checkpoints say activation_bits 8, with weights of 4 and 8 bits."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from mixed_formats import DEFAULT, quantize_mixed
from vlmq_vllm.activations import round_tokens
from vlmq_vllm.checkpoint import QuantizationSpec, read_spec
from vlmq_vllm.format import WeightFormat

FORMATS = (DEFAULT, WeightFormat(8, 32, False), WeightFormat(4, 64, False), None, WeightFormat(8, -1, True))


def by_turns(index: int, name: str) -> WeightFormat | None:
    """The format of the model's linear number `index`."""
    return FORMATS[index % len(FORMATS)]


def quantize_rounded(model: Path, out: Path, choose: Callable = by_turns) -> dict[str, str]:
    """As `quantize_mixed`, with inputs of 8 bits."""
    written = quantize_mixed(model, out, choose)
    say_bits(out, 8)
    return written


def say_bits(folder: Path, bits: int) -> None:
    """Change what the checkpoint says of its inputs."""
    spec, path = read_spec(folder), folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = QuantizationSpec(spec.default, spec.overrides, bits).to_dict({"name": "tests"})
    path.write_text(json.dumps(config))


def round_inputs(model: torch.nn.Module, names) -> None:
    """Replace the forward of each named linear by the definition, y = W round(x) + bias."""
    for name in names:
        linear = model.get_submodule(name)
        forward = linear.forward
        linear.forward = lambda x, forward=forward: forward(round_tokens(x))
