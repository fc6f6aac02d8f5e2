"""Loads a folder as a transformers model; `vlmq_vllm` has transformers unpack vlmq's weights as it loads them.

Unpacked weights are rounded to the dtype of their scales first, as in a served model and in what `vlmq dequantize`
writes, and then to the one that is asked for.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError

from vlmq_vllm.errors import CheckpointError, QuantizeError
from vlmq_vllm.headers import read_config


def is_vlmq(folder: Path) -> bool:
    """Whether config.json says that the weights are packed by vlmq. Raises CheckpointError for a broken folder."""
    found = read_config(folder).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "vlmq"


def load_model(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model of `folder` in evaluation mode. Raises CheckpointError when tensors are missing or misshaped."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{folder} has a damaged file ({error}); copy it again from its source") from None
    except Exception as error:  # whatever damaged or unknown models make of transformers
        raise QuantizeError(f"transformers cannot load {folder} ({error!r:.200})") from error
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if wrong:
        raise CheckpointError(f"{folder} has no tensor that fits {wrong[0]}; copy the model again from its source")
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise QuantizeError(f"device {device!r} cannot be used ({str(error).partition(chr(10))[0]})") from None
