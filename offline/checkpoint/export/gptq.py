"""Exports to GPTQ's layout, as AutoGPTQ made it common and GPTQModel reads it. Per linear [O, I], with G groups:

    qweight [I * bits / 32, O] int32    codes packed along I: our dense stream, transposed (3 bits too: 32 in 3 words)
    qzeros  [G, O * bits / 32] int32    zero points packed along O; version 1 ("gptq") stores them less one
    scales  [G, O]                      in the checkpoint's dtype
    g_idx   [I] int32                   group of each column

Tensors get their names in memory, which GPTQModel looks for. Version 1 has no zero point 0, and GPTQModel takes its
asymmetric weights from itself alone; version 2 ("gptq_v2") stores zero points as they are and is written for those.
"""

import re
from collections import Counter

import torch

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.errors import RefusedError
from vlmq_vllm.format import WORD, pack, unpack
from vlmq_vllm.offline.checkpoint.export.model import Model

NAME = "gptq"
IN_MEMORY = True  # tensors get their names in memory
V1, V2 = "gptq", "gptq_v2"


def check(model: Model) -> None:
    """Raises RefusedError for what the layout, or GPTQModel reading it, cannot hold."""
    for name, module in model.modules.items():
        if model.layers and not model.in_memory(name).startswith(f"{model.layers}."):
            raise RefusedError(
                f"{name} lies outside the decoder's layers, where software for {NAME} expects 16 bits; quantise with "
                "--vision-bits 16 --connector-bits 16, or export to compressed-tensors"
            )
        if module.columns % WORD or module.rows % WORD:
            raise RefusedError(
                f"{name} is {module.rows} x {module.columns}, and {NAME} has whole words of {WORD} codes only; export "
                "to compressed-tensors"
            )


def tensors(module: ModuleInfo, parts: dict[str, torch.Tensor], header: dict) -> dict[str, torch.Tensor]:
    format, groups = module.format, module.format.groups(module.columns)
    if format.symmetric:
        zeros = torch.full((groups, module.rows), format.middle, dtype=torch.int32)
    else:
        zeros = unpack(parts["weight_zero_point"].T, format.bits, module.rows).int()
    return {
        "qweight": parts["weight_packed"].T,
        "qzeros": pack(zeros if header["checkpoint_format"] == V2 else zeros - 1, format.bits),
        "scales": parts["weight_scale"].T,
        "g_idx": format.group_of(module.columns).int(),
    }


def header(model: Model) -> dict:
    """The quantization_config: the commonest format, with rules for other modules and for those left alone."""
    default = Counter(module.format for module in model.modules.values()).most_common(1)[0][0]
    dynamic = {
        f"+:{_pattern(model.names(name))}": {
            "bits": module.format.bits,
            "group_size": module.format.group_size,
            "sym": module.format.symmetric,
        }
        for name, module in sorted(model.modules.items())
        if module.format != default
    }
    dynamic |= {f"-:{_pattern([name])}": {} for name in model.plain}
    return {
        "quant_method": NAME,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.symmetric,
        "desc_act": False,
        "checkpoint_format": V1 if all(module.format.symmetric for module in model.modules.values()) else V2,
        "lm_head": False,
        "dynamic": dynamic,
    }


def note(header: dict) -> str:
    return f"zero points as in checkpoint_format {V2}" if header["checkpoint_format"] == V2 else ""


def _pattern(names: list[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, names))})$"
