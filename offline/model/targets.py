"""Finds what a run quantises: decoder layers, and by option the vision tower's blocks and the connectors.

A unit is one of these modules; it is quantised as a whole and becomes one file of the checkpoint. What is left of the
source model follows in units of its own.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.layers import called, named_linears
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.quantize import KEPT, Settings
from vlmq_vllm.unserved import why_unserved

SHARD = 512 << 20  # bytes of unquantised tensors per file, more only for a tensor that is larger itself
ORDER = ("vision", "connector", "language")  # in which components are quantised


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

    @property
    def packed_bits(self) -> float:
        """Bits of the packed linear on disk, scales and zero points included."""
        return self.format.bits_per_weight(self.rows, self.columns) * self.rows * self.columns


def find_units(source: Source, settings: Settings) -> list[Unit]:
    """The units in the order in which they are quantised: tower, connectors, decoder. A component of which any linear
    is quantised is there as a whole."""
    units = []
    for component in ORDER:
        if settings.format_of(component) is None and not settings.modules:
            continue
        names = _names(source, component)
        if any(settings.format_for(component, name) for name in names) or not (names or settings.modules):
            modules = enumerate(_modules(source, component))
            units += [Unit(f"{component}-{i:05d}", component, name, i) for i, name in modules]
    return units


def find_targets(source: Source, settings: Settings, units: list[Unit]) -> list[Target]:
    """The units' linears that are quantised. Raises RefusedError for one that vLLM would not load, unless
    `settings.force`, and for a component without linears; QuantizeError for overrides that name no linear."""
    _check_overrides(source, settings)
    targets = []
    for unit in units:
        for name, linear in _linears_in(source, unit.module).items():
            module = source.module_in_files(name)
            format = settings.format_for(unit.component, module)
            if format is not None:
                rows, columns = linear.weight.shape
                reason = why_unserved(name, (rows, columns), source.config)
                if reason and not settings.force:
                    raise RefusedError(
                        f"{name} {[rows, columns]} cannot be served at {format.bits} bits: {reason}; "
                        f"use --{unit.component}-bits {KEPT}, or --force to write it all the same"
                    )
                targets.append(Target(name, module, unit.component, rows, columns, format))
    if settings.modules and not targets:
        raise RefusedError(f"nothing is left to quantise: the overrides (modules) leave every linear at {KEPT} bits")
    for component in {unit.component for unit in units}:
        if not any(target.component == component for target in targets):
            raise RefusedError(f"this model's {component} has no linear layer to quantise; leave it at {KEPT} bits")
    _check_experts(source, settings, targets)
    return targets


def find_kept(source: Source, targets: list[Target], units: list[Unit]) -> dict[str, list[str]]:
    """By unit key its tensors that stay as they are: norms, biases, linears at 16 bits; by their names in the files."""
    taken, keys = _taken(source, targets), {unit.module: unit.key for unit in units}
    kept: dict[str, set[str]] = {unit.key: set() for unit in units}
    for name, place in source.places.items():
        key = key_of(name, keys)
        if key and place.tensor not in taken:
            kept[key].add(place.tensor)
    return {key: sorted(names) for key, names in kept.items()}


def find_rest(source: Source, targets: list[Target], kept: dict[str, list[str]]) -> dict[str, list[str]]:
    """Every tensor of the source that belongs to no unit, by unit key, in files of about SHARD bytes. kept: of the
    units, as `find_kept` gives it."""
    taken = _taken(source, targets).union(*kept.values())
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
    taken = _taken(source, targets)
    packed = sum(target.packed_bits / 8 for target in targets)
    return math.ceil(packed) + sum(stored_bytes(source, name) for name in source.headers if name not in taken)


def key_of(name: str, keys: dict[str, str]) -> str | None:
    """The key of the unit in which the in-memory name lies, None outside of all. keys: by the units' modules."""
    while name and name not in keys:
        name = name.rpartition(".")[0]
    return keys.get(name)


def _taken(source: Source, targets: list[Target]) -> set[str]:
    """The tensors in the files that become packed."""
    return {source.places[f"{target.name}.weight"].tensor for target in targets}


def stored_bytes(source: Source, name: str) -> int:
    """Size of a tensor in the source's files."""
    return source.headers[name].nbytes


def _blocks_used(config: dict, count: int) -> int:
    """Blocks of a tower of `count` up to the layer whose output the connector takes: vLLM drops those after it. Outputs
    are counted from the embeddings (0) on, or from the end; LLaVA-1.5 has -2."""
    layers = config.get("vision_feature_layer", -1)
    layers = layers if isinstance(layers, list) else [layers]
    return max(layer if layer >= 0 else count + 1 + layer for layer in layers)


def _modules(source: Source, component: str) -> list[str]:
    """In-memory names of a component's modules that are quantised one after the other."""
    family = source.family
    if component == "connector":
        return [name for root in family.connectors for name in called(source.model, root)]
    stack = {"vision": family.blocks, "language": family.layers}[component]
    count = len(source.stack(stack))
    count = min(count, _blocks_used(source.config, count)) if component == "vision" else count
    return [f"{stack}.{i}" for i in range(count)]


def _names(source: Source, component: str) -> list[str]:
    """Names in the files of a component's linears."""
    modules = _modules(source, component)
    return [source.module_in_files(name) for module in modules for name in _linears_in(source, module)]


def _check_overrides(source: Source, settings: Settings) -> None:
    """Raises QuantizeError for an exception that names no linear."""
    if settings.modules:
        names = [name for component in ORDER for name in _names(source, component)]
        for pattern in settings.modules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise QuantizeError(
                    f"modules: {pattern!r} names no linear that can be quantised; give names as in the model's files, "
                    f"such as {_names(source, 'language')[0]}"
                )


def _linears_in(source: Source, module: str) -> dict[str, torch.nn.Linear]:
    """The linears of a module, all by in-memory names."""
    linears = named_linears(source.model.get_submodule(module))
    return {f"{module}.{name}": linear for name, linear in linears.items()}


def _check_experts(source: Source, settings: Settings, targets: list[Target]) -> None:
    """Raises RefusedError unless a layer's experts share a format for gate and up, and one for down, and for rounded
    inputs."""
    if settings.activation_bits != KEPT and any(is_expert(target.name) for target in targets):
        raise RefusedError(
            f"activation_bits is {settings.activation_bits}, but inputs of experts are served at {KEPT} bits only; "
            f"leave it at {KEPT}, or the experts (modules: their names, such as '*.experts.*', at {KEPT})"
        )
    found: dict[tuple[str, bool], list[WeightFormat]] = {}
    for target in targets:
        if is_expert(target.name):
            key = target.name.rpartition(".")[0].rpartition(".")[0], target.name.endswith("down_proj")
            found.setdefault(key, []).append(target.format)
    for (experts, down), formats in found.items():
        whole = len(source.stack(experts)) * (1 if down else 2)
        if len(set(formats)) > 1 or len(formats) != whole:
            raise RefusedError(
                f"modules: {experts} would have several formats for {'down' if down else 'gate and up'}; all experts "
                "of a layer are served in one, give a pattern that names them all"
            )
