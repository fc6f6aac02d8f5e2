"""The models of `family_models.py` rounded to a mixture of formats: every width, both grids, parts of groups, one
group per row, and linears left alone, side by side in the layers of decoder, vision tower and connector.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import MINMAX
from vlmq_vllm.offline.model.source import Source

DEFAULT = WeightFormat(4, 32, True)
# Taken in turn, so that neighbours differ; None stays in 16 bits.
FORMATS = (
    DEFAULT,
    WeightFormat(3, 32, False),
    WeightFormat(2, 64, True),
    None,
    WeightFormat(8, -1, False),
    WeightFormat(4, 64, False),
    WeightFormat(3, -1, True),
)


def by_turns(index: int, name: str) -> WeightFormat | None:
    """The format of the model's linear number `index`."""
    return FORMATS[index % len(FORMATS)]


def quantize_mixed(
    model: Path, out: Path, choose: Callable[[int, str], WeightFormat | None] = by_turns
) -> dict[str, str]:
    """Write `model` to the new folder `out`, each linear as `choose` says. In-memory name -> name in the files.

    `choose` is called with number and in-memory name. Experts are written one by one and all of them.
    """
    source = Source(model)
    tensors = load_file(model / "model.safetensors")
    overrides, written = {}, {}
    linears = [name for name, module in source.model.named_modules() if isinstance(module, torch.nn.Linear)]
    untied = [name for name in linears if f"{name}.weight" in source.places]
    for i, name in enumerate(untied):
        place = source.places[f"{name}.weight"]
        format = choose(i, name) or (DEFAULT if place.expert is not None else None)
        if format is None:
            continue
        weight = source.parameter(f"{name}.weight")
        packed = round_to_nearest(weight.float(), format, weight.dtype, MINMAX).tensors()
        tensors |= {f"{place.module}.{part}": tensor for part, tensor in packed.items()}
        tensors.pop(place.tensor, None)
        if format != DEFAULT:
            overrides[place.module] = format
        written[name] = place.module
    shutil.copytree(model, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = QuantizationSpec(DEFAULT, overrides).to_dict({"name": "tests"})
    (out / "config.json").write_text(json.dumps(config))
    return written
