"""Writes a checkpoint's weights back to 16 bits, for software that knows nothing of it and for comparisons.

Every packed weight is rounded once to its scale's dtype; all other tensors and files stay. Experts, which are packed
one by one, go back into fused tensors: from any others transformers would load nothing and draw random experts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_vllm.checkpoint import ModuleInfo, QuantizationSpec
from vlmq_vllm.errors import CheckpointError, RefusedError
from vlmq_vllm.foreign import spec_of
from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.headers import TensorInfo, Tensors, read_config, read_headers
from vlmq_vllm.names import EXPERT_PARTS
from vlmq_vllm.offline.checkpoint.writer import Writer
from vlmq_vllm.packing import Packing

EXPERT = re.compile(r"(.+\.experts)\.\d+\.(gate_proj|up_proj|down_proj)")


def dequantize(folder: Path, out: Path) -> None:
    """Write the 16-bit twin of the checkpoint `folder`, ours or another tool's that `vlmq_vllm/foreign` reads, to the
    new folder `out`. Raises CheckpointError, and RefusedError for a checkpoint that also rounds inputs."""
    config, headers = read_config(folder), read_headers(folder)
    if config.get("quantization_config") is None:
        raise CheckpointError(f"{folder} is not quantised (config.json has no quantization_config)")
    spec = spec_of(config.pop("quantization_config"))
    packing, modules = spec.read(folder, headers)
    if isinstance(spec, QuantizationSpec) and spec.activation_bits != 16:
        raise RefusedError(
            "activation_bits is 8, and a model in 16 bits would answer differently: nothing in it rounds the inputs; "
            "serve the checkpoint as it is, or load it with transformers' from_pretrained, which rounds them"
        )
    twin = Twin(Tensors(folder, headers), packing, modules)
    fused = find_experts(modules, headers)
    files = sorted({info.file for info in headers.values()})
    size = sum((folder / name).stat().st_size for name in files)
    packed = sum(2 * module.rows * module.columns for module in modules.values())
    with Writer(out, size + packed, files) as writer:
        for file_name in files:
            here = {name for name, info in headers.items() if info.file == file_name}
            found = {name: twin.tensors.get(name) for name in here if not twin.is_packed(name)}
            for module in modules:
                if twin.first(module) in here and not EXPERT.fullmatch(module):
                    found[f"{module}.weight"] = twin.weight(module)
            for name, experts in fused.items():
                if twin.first(experts[0][0]) in here:
                    found[name] = twin.stack(experts)
            writer.add(file_name, found)
        writer.finish(folder, config, {"dequantized_from": str(folder.name)})


@dataclass(frozen=True)
class Twin:
    """The weights of a packed checkpoint, in the dtype of their scales."""

    tensors: Tensors
    packing: Packing
    modules: dict[str, ModuleInfo]

    def is_packed(self, name: str) -> bool:
        """Whether the tensor belongs to a packed weight."""
        module, _, part = name.rpartition(".")
        return module in self.modules and part != "bias"

    def first(self, module: str) -> str:
        """The tensor that holds the codes."""
        return f"{module}.{next(iter(self.packing.parts))}"

    def weight(self, module: str) -> torch.Tensor:
        """[O, I]."""
        info = self.modules[module]
        parts = {"weight_shape": torch.tensor([info.rows, info.columns])}
        for name in self.packing.shapes(module, info.format, info.rows, info.columns):
            stored = self.tensors.get(f"{module}.{name}")
            part = self.packing.unpack(module, name, stored, info.format, (info.rows, info.columns))
            if part is not None:
                parts[self.packing.parts[name]] = part
        return QuantizedWeight.from_tensors(info.format, parts).dequantize(parts["weight_scale"].dtype)

    def stack(self, experts: list[list[str]]) -> torch.Tensor:
        """The fused tensor [experts, inputs, outputs of all projections]."""
        stacked = torch.empty(0)
        for i, projections in enumerate(experts):
            expert = torch.cat([self.weight(module) for module in projections]).T
            if i == 0:
                stacked = expert.new_empty(len(experts), *expert.shape)
            stacked[i] = expert
        return stacked


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
