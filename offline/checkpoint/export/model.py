"""Reads what an export starts from: the quantised modules of a checkpoint, and their names in other software.

Stock software matches names of config.json with those of modules in memory, and engines with those in the files; where
transformers renames (`model.layers` becomes `model.language_model.layers`) a header has to name both.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_vllm.checkpoint import ModuleInfo, read_modules
from vlmq_vllm.errors import CheckpointError, RefusedError
from vlmq_vllm.headers import TensorInfo, read_config, read_headers
from vlmq_vllm.names import FUSED
from vlmq_vllm.offline.model.families import FAMILIES
from vlmq_vllm.offline.model.skeleton import build_skeleton


@dataclass(frozen=True)
class Model:
    """A vlmq folder. modules: what is packed, by name in the files. memory: of each tensor in the files the name in
    memory, for a packed one that of the weight. plain: every linear that is not packed, under both names. layers: the
    decoder's layers in memory, "" if unknown."""

    folder: Path
    config: dict
    headers: dict[str, TensorInfo]
    modules: dict[str, ModuleInfo]
    memory: dict[str, str]
    plain: tuple[str, ...]
    layers: str

    def names(self, module: str) -> list[str]:
        """The module's names, the one in the files first."""
        return list(dict.fromkeys((module, self.in_memory(module))))

    def in_memory(self, module: str) -> str:
        return self.memory[f"{module}.weight_packed"].removesuffix(".weight")


def read_model(folder: Path) -> Model:
    """Raises CheckpointError for a folder that is unsound and RefusedError for experts that are packed."""
    modules, headers, config = read_modules(folder), read_headers(folder), read_config(folder)
    if not modules:
        raise CheckpointError(f"{folder} calls itself vlmq, but no tensor is quantised; quantise it anew")
    experts = [module for module in modules if re.search(r"\.experts\.\d+\.", module)]
    if experts:
        raise RefusedError(
            f"{experts[0]} is an expert of a mixture, which cannot be exported yet; vlmq dequantize writes the model "
            "in 16 bits"
        )
    skeleton = build_skeleton(folder)
    memory = _names_in_memory(skeleton, headers)
    linears = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    packed = {module: memory[f"{module}.weight_packed"] for module in modules}
    strange = sorted(module for module, weight in packed.items() if weight not in linears)
    if strange:
        raise RefusedError(f"{strange[0]} is no linear layer of transformers' model, which others load; leave it at 16")
    files = {renamed: name for name, renamed in memory.items()}
    plain = {name for weight in linears - set(packed.values()) for name in (weight, files.get(weight, weight))}
    layers = FAMILIES[config["model_type"]].layers if config.get("model_type") in FAMILIES else ""
    names = tuple(sorted(name.removesuffix(".weight") for name in plain))
    return Model(folder, config, headers, modules, memory, names, layers)


def _names_in_memory(skeleton: torch.nn.Module, headers: dict[str, TensorInfo]) -> dict[str, str]:
    """Tensor name in the files -> in memory, by transformers' rules; the file's where no rule leads to a tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(skeleton) if isinstance(rule, WeightRenaming)]
    empty = skeleton.state_dict()
    names = {}
    for name in headers:
        module, _, part = name.rpartition(".")
        weight = f"{module}.weight" if part == "weight_packed" else name
        renamed, _ = rename_source_key(weight, rules, [], skeleton.base_model_prefix, empty)
        names[name] = renamed if renamed in empty else name
    return names


def check_groups(model: Model, target: str) -> None:
    """Others allocate floor(columns / group) groups. Raises RefusedError for a row that ends in a part of a group."""
    for name, module in model.modules.items():
        size = module.format.group_size
        if size != -1 and module.columns % size:
            raise RefusedError(
                f"{name} has {module.columns} columns in groups of {size}, and {target} has no parts of groups; "
                f"quantise it with a group size that divides {module.columns}, or -1"
            )


def check_fused(model: Model, target: str) -> None:
    """Stock engines give the linears that they fuse one format. Raises RefusedError where these differ."""
    there = set(model.modules) | set(model.plain)
    for name, module in model.modules.items():
        parent, _, leaf = name.rpartition(".")
        for parts in (parts for parts in FUSED.values() if leaf in parts):
            for other in (f"{parent}.{part}" for part in parts if f"{parent}.{part}" in there):
                found = model.modules[other].format if other in model.modules else None
                if found != module.format:
                    what = f"{found.bits} bits in groups of {found.group_size}" if found else "16 bits"
                    raise RefusedError(
                        f"{name} has {module.format.bits} bits in groups of {module.format.group_size} and {other} "
                        f"has {what}; software for {target} fuses them, quantise them alike"
                    )
