"""Exports a checkpoint: the same codes, scales and zero points in the layout and under the header of other software.

Nothing is rounded again. What the target cannot hold is refused before anything is written; files are rewritten one
after the other, each module's tensors in the file that has its codes.
"""

from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open

from vlmq_vllm.checkpoint import read_spec
from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.format import PARTS
from vlmq_vllm.offline.checkpoint.export import compressed_tensors, gptq
from vlmq_vllm.offline.checkpoint.export.model import Model, read_model
from vlmq_vllm.offline.checkpoint.writer import Writer

TARGETS: dict[str, ModuleType] = {target.NAME: target for target in (compressed_tensors, gptq)}


def export(folder: Path, out: Path, name: str) -> str:
    """Write the vlmq checkpoint `folder` to `out` for the target `name`; what its readers need, "" if nothing.

    Raises QuantizeError, RefusedError and CheckpointError.
    """
    if name not in TARGETS:
        raise QuantizeError(f"--format is {name!r}; it must be {' or '.join(TARGETS)}")
    if read_spec(folder).activation_bits != 16:  # compressed-tensors' own integers of 8 bits have steps of max / 127.5
        raise RefusedError(
            f"activation_bits is 8, and software for {name} rounds inputs in another way or not at all; serve the "
            "checkpoint as it is, or quantise again with --activation-bits 16"
        )
    target = TARGETS[name]
    model = read_model(folder)
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
    with safe_open(model.folder / file_name, "pt") as file:
        for name in file.keys():  # noqa: SIM118, safe_open is not iterable
            module, _, part = name.rpartition(".")
            if part not in PARTS:
                tensors[target.plain_name(name, model)] = file.get_tensor(name)
            elif part == "weight_packed":
                own = target.tensors(model.modules[module], _parts(model, module), header)
                tensors |= {f"{target.module_name(module, model)}.{part}": tensor for part, tensor in own.items()}
    return tensors


def _parts(model: Model, module: str) -> dict[str, torch.Tensor]:
    parts = {}
    for part in PARTS:
        if (info := model.headers.get(f"{module}.{part}")) is not None:
            with safe_open(model.folder / info.file, "pt") as file:
                parts[part] = file.get_tensor(f"{module}.{part}")
    return parts
