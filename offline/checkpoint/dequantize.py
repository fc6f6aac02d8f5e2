"""Writes a checkpoint's weights back to 16 bits, for software that knows nothing of vlmq and for comparisons.

Every packed weight is rounded once to its scale's dtype; all other tensors and files stay. What vLLM answers from this
twin is what it must answer from the quantised checkpoint. Experts, which are packed one by one, go back into the fused
tensors in which they were published: from any others transformers would load nothing and draw random experts.
"""

import re
from pathlib import Path

import torch

from vlmq_vllm.checkpoint import ModuleInfo, read_modules, read_spec
from vlmq_vllm.errors import CheckpointError, RefusedError
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.headers import TensorInfo, Tensors, read_config, read_headers
from vlmq_vllm.names import EXPERT_PARTS
from vlmq_vllm.offline.checkpoint.writer import Writer

EXPERT = re.compile(r"(.+\.experts)\.\d+\.(gate_proj|up_proj|down_proj)")


def dequantize(folder: Path, out: Path) -> None:
    """Write the 16-bit twin of the vlmq checkpoint `folder` to the new folder `out`. Raises CheckpointError, and
    RefusedError for a checkpoint that also rounds inputs."""
    modules = read_modules(folder)
    if read_spec(folder).activation_bits != 16:
        raise RefusedError(
            "activation_bits is 8, and a model in 16 bits would answer differently: nothing in it rounds the inputs; "
            "serve the checkpoint as it is, or load it with transformers' from_pretrained, which rounds them"
        )
    headers = read_headers(folder)
    fused = find_experts(modules, headers)
    config = read_config(folder)
    del config["quantization_config"]
    files = sorted({info.file for info in headers.values()})
    size = sum((folder / name).stat().st_size for name in files)
    packed = sum(2 * module.rows * module.columns for module in modules.values())
    with Writer(out, size + packed, files) as writer:
        for file_name in files:
            here = {name for name, info in headers.items() if info.file == file_name}
            tensors = Tensors(folder, headers)
            found = {name: tensors.get(name) for name in here if name.rpartition(".")[2] not in PARTS}
            for module, info in modules.items():
                if f"{module}.weight_packed" in here and not EXPERT.fullmatch(module):
                    found[f"{module}.weight"] = _weight(tensors, module, info)
            for name, experts in fused.items():
                if f"{experts[0][0]}.weight_packed" in here:
                    found[name] = _stack(tensors, experts, modules)
            writer.add(file_name, found)
        writer.finish(folder, config, {"dequantized_from": str(folder.name)})


def find_experts(modules: dict[str, ModuleInfo], headers: dict[str, TensorInfo]) -> dict[str, list[list[str]]]:
    """Name of every fused tensor -> for each expert the modules whose outputs it holds side by side.

    Raises CheckpointError for a layer without all its experts, or with experts that differ in shape.
    """
    packed: dict[str, list[str]] = {}
    for module in modules:
        if expert := EXPERT.fullmatch(module):
            layer, projection = expert.groups()
            fused = next(name for name, projections in EXPERT_PARTS.items() if projection in projections)
            packed.setdefault(f"{layer}.{fused}", []).append(module)
    return {name: _by_expert(name, found, modules, headers) for name, found in packed.items()}


def _by_expert(name: str, found: list[str], modules: dict, headers: dict) -> list[list[str]]:
    layer, _, fused = name.rpartition(".")
    router = headers.get(f"{layer.removesuffix('.experts')}.gate.weight")
    if router is None or len(router.shape) != 2:
        raise CheckpointError(f"{layer} has no router beside it; copy the checkpoint again or quantise anew")
    shape = modules[found[0]].rows, modules[found[0]].columns
    experts: list[list[str]] = []
    for expert in range(router.shape[0]):
        experts.append([f"{layer}.{expert}.{projection}" for projection in EXPERT_PARTS[fused]])
        for module in experts[-1]:
            if module not in modules:
                raise CheckpointError(f"{module} is not packed, others are; copy the checkpoint again or quantise anew")
            if (modules[module].rows, modules[module].columns) != shape:
                raise CheckpointError(f"{module} has another shape than {found[0]}; quantise the model anew")
    surplus = set(found).difference(*experts)
    if surplus:
        raise CheckpointError(f"{min(surplus)} is one too many: the router has {len(experts)}; quantise the model anew")
    return experts


def _stack(tensors: Tensors, experts: list[list[str]], modules: dict[str, ModuleInfo]) -> torch.Tensor:
    """The fused tensor [experts, inputs, outputs of all projections]."""
    stacked = torch.empty(0)
    for i, projections in enumerate(experts):
        expert = torch.cat([_weight(tensors, module, modules[module]) for module in projections]).T
        if i == 0:
            stacked = expert.new_empty(len(experts), *expert.shape)
        stacked[i] = expert
    return stacked


def _weight(tensors: Tensors, module: str, info: ModuleInfo) -> torch.Tensor:
    parts = {part: tensors.get(f"{module}.{part}") for part in info.format.shapes(info.rows, info.columns)}
    return QuantizedWeight.from_tensors(info.format, parts).dequantize(parts["weight_scale"].dtype)
