"""Sorts every tensor of a model's files by component, and says what of it becomes quantised.

Components are language, experts (the linears of the decoder's layers), vision, connector, embeddings, lm_head and
"norms and other". Sizes come from the files' headers alone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import Target, stored_bytes

COMPONENT_NAMES = ("language", "experts", "vision", "connector", "embeddings", "lm_head", "norms and other")
OTHER = COMPONENT_NAMES[-1]


@dataclass
class Component:
    """The tensors of one component and dtype. `parameters` and `bytes` as the source stores them; `quantized` of the
    parameters become `packed_bits` bits together, scales and zero points included."""

    component: str
    dtype: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    quantized: int = 0
    packed_bits: float = 0.0

    @property
    def bits(self) -> float | None:
        """Stored bits per quantised weight."""
        return self.packed_bits / self.quantized if self.quantized else None


def find_components(source: Source, targets: Iterable[Target]) -> list[Component]:
    """The components in the order of COMPONENT_NAMES; a tensor that the model does not use counts as other."""
    names: dict[str, str] = {}
    for name, place in source.places.items():
        names.setdefault(place.tensor, name)
    tensor_of = {target.name: source.places[f"{target.name}.weight"].tensor for target in targets}
    linears = {name for name, module in source.model.named_modules() if isinstance(module, torch.nn.Linear)}
    component_of = {tensor: _component(source, names.get(tensor, ""), linears) for tensor in source.headers}
    found: dict[tuple[str, str], Component] = {}
    for tensor, info in source.headers.items():
        key = (component_of[tensor], info.dtype)
        part = found.setdefault(key, Component(*key))
        part.tensors += 1
        part.parameters += math.prod(info.shape)
        part.bytes += stored_bytes(source, tensor)
    for target in targets:
        tensor = tensor_of[target.name]
        part = found[component_of[tensor], source.headers[tensor].dtype]
        part.quantized += target.rows * target.columns
        part.packed_bits += target.packed_bits
    return sorted(found.values(), key=lambda part: (COMPONENT_NAMES.index(part.component), part.dtype))


def _component(source: Source, name: str, linears: set[str]) -> str:
    """The component of a parameter by its in-memory name; "" is one that the model does not use."""
    family = source.family
    places = dict.fromkeys(family.connectors, "connector")  # may lie in the tower: asked first
    places |= {family.vision: "vision", family.embed: "embeddings", "lm_head": "lm_head"}
    for place, component in places.items():
        if name.startswith(f"{place}."):
            return component
    module, _, leaf = name.rpartition(".")
    if name.startswith(f"{family.layers}.") and leaf == "weight" and module in linears:
        return "experts" if is_expert(module) else "language"
    return OTHER
