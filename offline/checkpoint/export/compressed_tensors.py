"""Exports to compressed-tensors, format pack-quantized: the tensors are ours byte by byte, the header is another.

3-bit weights are packed densely, as compressed-tensors does from 0.18 on and vLLM 0.32 expects; older ones pack ten to
a word and stop at the tensors' shapes.
"""

import torch

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.errors import RefusedError
from vlmq_vllm.format import WORD, WeightFormat
from vlmq_vllm.offline.checkpoint.export.model import Model, check_fused

NAME = "compressed-tensors"
IN_MEMORY = False  # tensors keep their names in the files


def check(model: Model) -> None:
    """Raises RefusedError for what the format, or stock vLLM reading it, cannot hold."""
    check_fused(model, NAME)
    for name, module in model.modules.items():
        if not module.format.symmetric and module.rows * module.format.bits % WORD:
            raise RefusedError(
                f"{name} has {module.rows} rows, whose zero points of {module.format.bits} bits fill no whole words, "
                f"as vLLM wants of {NAME}; quantise it with --symmetric"
            )


def tensors(module: ModuleInfo, parts: dict[str, torch.Tensor], header: dict) -> dict[str, torch.Tensor]:
    return parts


def header(model: Model) -> dict:
    """The quantization_config: a group for each format with its modules by name, and whatever is left alone."""
    formats = sorted({module.format for module in model.modules.values()}, key=str)
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(model, format) for i, format in enumerate(formats)},
        "ignore": list(model.plain),
        "kv_cache_scheme": None,
    }


def note(header: dict) -> str:
    groups = header["config_groups"].values()
    dense = any(group["weights"]["num_bits"] == 3 for group in groups)
    lines = ["its 3-bit weights need compressed-tensors 0.18 or vLLM 0.32"] if dense else []
    if len(groups) > 1:
        lines.append(
            "transformers 5.23 and 5.24 take all its layers for the first one's format: load it with 5.22 or in vLLM"
        )
    return "; ".join(lines)


def _group(model: Model, format: WeightFormat) -> dict:
    owned = sorted(name for name, module in model.modules.items() if module.format == format)
    channel = format.group_size == -1
    return {
        "targets": [name for module in owned for name in model.names(module)],
        "weights": {
            "num_bits": format.bits,
            "type": "int",
            "symmetric": format.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else format.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
