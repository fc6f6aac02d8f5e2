"""What a run quantises, part by part: decoder layers, and by option the vision tower's blocks and the connectors.

A unit is one of these modules; it is quantised as a whole and becomes one file of the checkpoint. What is left of the
source model follows in units of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.linears import linears_of
from vlmq_vllm.offline.settings import KEPT, Settings
from vlmq_vllm.offline.source import Source
from vlmq_vllm.unserved import why_unserved

SHARD = 512 << 20  # bytes of unquantised tensors per file, more only for a tensor that is larger itself
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


@dataclass(frozen=True)
class Unit:
    """A module (in-memory name) to be quantised; `index` is its place in its stack."""

    key: str
    component: str
    module: str
    index: int


@dataclass(frozen=True)
class Target:
    """A linear to be quantised: its in-memory name, its name in the files, weight [rows, columns] and format."""

    name: str
    module: str
    component: str
    rows: int
    columns: int
    format: WeightFormat


def find_units(source: Source, settings: Settings) -> list[Unit]:
    """The units in the order in which they are quantised: tower, connectors, decoder."""
    family, units = source.family, []
    stacks = {"vision": family.blocks, "connector": "", "language": family.layers}
    for component, stack in stacks.items():
        if settings.format_of(component) is None:
            continue
        if component == "connector":
            modules = [name for root in family.connectors for name in _connectors(source, root)]
        else:
            count = len(source.model.get_submodule(stack))
            count = min(count, _blocks_used(source.config, count)) if component == "vision" else count
            modules = [f"{stack}.{i}" for i in range(count)]
        units += [Unit(f"{component}-{i:05d}", component, name, i) for i, name in enumerate(modules)]
    return units


def find_targets(source: Source, settings: Settings, units: list[Unit]) -> list[Target]:
    """The units' linears. Raises RefusedError for one that vLLM would not load, unless `settings.force`, and for a
    component without linears."""
    targets = []
    for unit in units:
        format = settings.format_of(unit.component)
        module = source.model.get_submodule(unit.module)
        for linear in linears_of(module):
            name = f"{unit.module}.{linear}"
            rows, columns = module.get_submodule(linear).weight.shape
            _check_served(source, settings, unit, name, (rows, columns))
            targets.append(Target(name, source.module_in_files(name), unit.component, rows, columns, format))
    for component in {unit.component for unit in units}:
        if not any(target.component == component for target in targets):
            raise RefusedError(f"this model's {component} has no linear layer to quantise; leave it at {KEPT} bits")
    return targets


def find_rest(source: Source, targets: list[Target]) -> dict[str, list[str]]:
    """Every other tensor of the source, by unit key, in files of about SHARD bytes."""
    taken = {source.places[f"{target.name}.weight"].tensor for target in targets}
    rest: dict[str, list[str]] = {}
    size = SHARD
    for name in sorted(source.headers):
        if name not in taken:
            size += stored_bytes(source, name)
            if size > SHARD:
                rest[f"rest-{len(rest):05d}"] = own = []
                size = stored_bytes(source, name)
            own.append(name)
    return rest


def expected_bytes(source: Source, targets: list[Target]) -> int:
    """Size of the checkpoint's weights on disk."""
    taken = {source.places[f"{target.name}.weight"].tensor for target in targets}
    packed = sum(t.format.bits_per_weight(t.rows, t.columns) * t.rows * t.columns / 8 for t in targets)
    return math.ceil(packed) + sum(stored_bytes(source, name) for name in source.headers if name not in taken)


def stored_bytes(source: Source, name: str) -> int:
    """Size of a tensor in the source's files."""
    info = source.headers[name]
    return math.prod(info.shape) * BYTES.get(info.dtype, 1)


def _blocks_used(config: dict, count: int) -> int:
    """Blocks of a tower of `count` up to the layer whose output the connector takes: vLLM drops those behind it.

    `vision_feature_layer` counts outputs from the embeddings (0) on, or from the end; LLaVA-1.5 has -2.
    """
    layers = config.get("vision_feature_layer", -1)
    layers = layers if isinstance(layers, list) else [layers]
    return max(layer if layer >= 0 else count + 1 + layer for layer in layers)


def _connectors(source: Source, root: str) -> Iterator[str]:
    """The modules that are called one by one: those of a list, or the module itself."""
    module = source.model.get_submodule(root)
    if isinstance(module, torch.nn.ModuleList):
        yield from (f"{root}.{i}" for i in range(len(module)))
    else:
        yield root


def _check_served(source: Source, settings: Settings, unit: Unit, name: str, shape: tuple[int, int]) -> None:
    reason = why_unserved(name, shape, source.config)
    if reason and not settings.force:
        option = f"--{unit.component}-bits {KEPT}"
        raise RefusedError(
            f"{name} {list(shape)} cannot be served at {settings.format_of(unit.component).bits} bits: {reason}; "
            f"use {option}, or --force to write it all the same"
        )
