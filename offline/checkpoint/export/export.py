"""Exports a checkpoint: the same codes, scales and zero points in the layout and under the header of other software.

What the target cannot hold is refused before anything is written.
"""

from pathlib import Path
from types import ModuleType

import torch

from vlmq_vllm.checkpoint import read_spec
from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.format import PARTS
from vlmq_vllm.headers import Tensors
from vlmq_vllm.offline.checkpoint.export import compressed_tensors, gptq
from vlmq_vllm.offline.checkpoint.export.model import Model, check_groups, read_model
from vlmq_vllm.offline.checkpoint.writer import Writer

# Each has check, header, tensors (a packed module's, by their last name) and note (what readers need besides, or "").
TARGETS: dict[str, ModuleType] = {target.NAME: target for target in (compressed_tensors, gptq)}


def export(folder: Path, out: Path, name: str) -> str:
    """Write the vlmq checkpoint `folder` to `out` for the target `name`; what its readers need, "" if nothing. Raises
    QuantizeError, RefusedError and CheckpointError."""
    if name not in TARGETS:
        raise QuantizeError(f"--format is {name!r}; it must be {' or '.join(TARGETS)}")
    if read_spec(folder).activation_bits != 16:  # compressed-tensors' own integers of 8 bits have steps of max / 127.5
        raise RefusedError(
            f"activation_bits is 8, and software for {name} rounds inputs in another way or not at all; serve the "
            "checkpoint as it is, or quantise again with --activation-bits 16"
        )
    target = TARGETS[name]
    model = read_model(folder)
    check_groups(model, name)
    target.check(model)
    header = target.header(model)
    files = sorted({info.file for info in model.headers.values()})
    # g_idx, zero points of symmetric weights and other bytes that a target adds are less than the codes themselves
    size = sum((folder / file).stat().st_size for file in files)
    with Writer(out, 2 * size, files) as writer:
        for file_name in files:
            writer.add(file_name, _rewritten(model, file_name, target, header))
        config = model.config | {"quantization_config": header}
        writer.finish(folder, config, {"exported_from": folder.name, "format": name})
    return target.note(header)


def _rewritten(model: Model, file_name: str, target: ModuleType, header: dict) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    stored = Tensors(model.folder, model.headers)
    for name in (name for name, info in model.headers.items() if info.file == file_name):
        module, _, last = name.rpartition(".")
        if last not in PARTS:
            tensors[model.memory[name] if target.IN_MEMORY else name] = stored.get(name)
        elif last == "weight_packed":
            parts = {part: stored.get(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in model.headers}
            own = target.tensors(model.modules[module], parts, header)
            prefix = model.in_memory(module) if target.IN_MEMORY else module
            tensors |= {f"{prefix}.{part}": tensor for part, tensor in own.items()}
    return tensors
