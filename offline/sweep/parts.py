"""Finds the parts of a model to which a study gives widths, which linears they are, and the configurations of them.

Parts are whole components, thirds of a stack of layers, kinds of sublayer, single layers, or modules: what vLLM fuses
into one is one module (q, k and v; gate and up; gate and up of all experts of a layer, down of all of them), so that a
module can be given a width of its own in a checkpoint.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.names import FUSED
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import ORDER, Target, Unit, find_targets, find_units
from vlmq_vllm.offline.settings.quantize import KEPT, Settings
from vlmq_vllm.unserved import why_unserved

THIRDS = ("front", "middle", "end")
Widths = tuple[int, ...]  # of every part, 16 where it is kept: a configuration


@dataclass(frozen=True)
class Part:
    """Linears (in-memory names) that get one width."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """What a study is about: the units it walks through and their linears that can be served quantised."""

    units: list[Unit]
    targets: list[Target]

    def unit_of(self, target: Target) -> Unit:
        """The unit in which a target lies."""
        return next(unit for unit in self.units if target.name.startswith(f"{unit.module}."))

    @property
    def components(self) -> list[str]:
        """In the order of the forward pass."""
        return [name for name in ORDER if any(target.component == name for target in self.targets)]


def find_subject(source: Source, settings: Settings, components: tuple[str, ...] | None) -> Subject:
    """Units and targets (in the format of `settings`) of the components, or of all that have any linear that vLLM takes
    in packed form. Raises RefusedError for a component that is named and has none."""
    forced = replace(settings, vision_bits=settings.bits, connector_bits=settings.bits, force=True)
    units: list[Unit] = []
    targets: list[Target] = []
    for component in ORDER if components is None else [name for name in ORDER if name in components]:
        own = [unit for unit in find_units(source, forced) if unit.component == component]
        try:
            every = find_targets(source, forced, own)
        except RefusedError:  # of a component without linears
            every = []
        found = [t for t in every if not why_unserved(t.name, (t.rows, t.columns), source.config)]
        if not found and components is not None:
            raise RefusedError(f"this model's {component} has no linear that vLLM takes in packed form; leave it out")
        if found:
            units += own
            targets += found
    return Subject(units, targets)


def find_parts(by: str, subject: Subject) -> list[Part]:
    """The parts in the order of the forward pass. by: "component", "third", "kind", "layer" or "module"."""
    counts = Counter(unit.component for unit in subject.units)
    found: dict[str, list[str]] = {}
    for target in subject.targets:
        unit = subject.unit_of(target)
        name = _part(by, unit, target.name.removeprefix(f"{unit.module}."), counts[unit.component])
        prefix = f"{unit.component} " if len(subject.components) > 1 and by != "component" else ""
        found.setdefault(prefix + name, []).append(target.name)
    return [Part(name, tuple(linears)) for name, linears in found.items()]


def one_at_a_time(count: int, bits: tuple[int, ...]) -> list[Widths]:
    """The configurations that are run: all of `count` parts at each width, from wide to narrow, then each part alone at
    each width, the others at 16."""
    wide = sorted(bits, reverse=True)
    uniform = [(width,) * count for width in wide]
    return list(dict.fromkeys([*uniform, *(_alone(count, part, width) for part in range(count) for width in wide)]))


def find_rises(parts: list[Part], bits: tuple[int, ...], rows: dict[Widths, dict]) -> dict[str, dict[int, float]]:
    """By name of a part the KL (nats) with this part alone at a width, by width."""
    return {
        part.name: {width: rows[_alone(len(parts), number, width)]["kl"] for width in bits}
        for number, part in enumerate(parts)
    }


def _alone(count: int, part: int, width: int) -> Widths:
    return tuple(width if i == part else KEPT for i in range(count))


def expand(parts: list[Part], widths: Widths, kept: bool = False) -> dict[str, int]:
    """Linears of the parts with their widths; those at 16 bits only where `kept`."""
    pairs = zip(parts, widths, strict=True)
    return {linear: width for part, width in pairs for linear in part.linears if kept or width != KEPT}


def label_of(parts: list[Part], widths: Widths) -> str:
    """A configuration in words."""
    if len(set(widths)) == 1:
        return f"all {widths[0]}"
    named = [f"{part.name} {width}" for part, width in zip(parts, widths, strict=True) if width != KEPT]
    return ", ".join(named) + ", others 16" if KEPT in widths else ", ".join(named)


def _part(by: str, unit: Unit, linear: str, count: int) -> str:
    """The part of a linear by its name in the unit; count: units of the component."""
    if by == "component":
        return unit.component
    if by == "third":
        return THIRDS[3 * unit.index // count]
    if by == "kind":
        return "attention" if re.search(r"attn|attention", linear) else "feed-forward"
    if by == "layer":
        return f"layer {unit.index}"
    parent, _, leaf = linear.rpartition(".")
    if is_expert(f".{linear}"):
        parent = parent.rpartition(".")[0]
    # what vLLM calls the layer into which it fuses a linear, without the ending; k and v alone are a part of qkv
    fused = next((name.removesuffix("_proj") for name, parts in FUSED.items() if leaf in parts), leaf)
    return ".".join(filter(None, (str(unit.index), parent, fused)))
