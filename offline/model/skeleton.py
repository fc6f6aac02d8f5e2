"""Builds a model without weights: transformers' own class on the meta device, with the buffers that are in no file."""

from pathlib import Path

import torch

from vlmq_vllm.errors import QuantizeError


def build_skeleton(folder: Path) -> torch.nn.Module:
    """The model that `folder`/config.json describes. Raises QuantizeError."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a damaged config.json makes of transformers
        reason = str(error).partition("\n")[0]
        raise QuantizeError(
            f"transformers cannot build the model that {folder}/config.json describes ({reason})"
        ) from error
    _fill_buffers(model)
    return model.eval()


def _fill_buffers(model: torch.nn.Module) -> None:
    """Buffers that are in no file, such as rotary frequencies, as the class that each module belongs to makes them."""
    from transformers import PreTrainedModel

    owners = {}
    for owner in model.modules():  # from the outside to the inside
        if isinstance(owner, PreTrainedModel):
            owners |= dict.fromkeys(owner.modules(), owner)
    for module, owner in owners.items():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if lost:
            for name in lost:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            owner._init_weights(module)
