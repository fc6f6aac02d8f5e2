"""Predicted peak memory of `vlmq quantize`: one function per phase, each term named after what it holds.

A phase gives what lies in the host's memory whatever the device is (pixel values, files) and what lies on the device
(streams, weights in float32, moments, the solver's working set). On a CPU both are one memory.
"""

import math
from dataclasses import dataclass, field, replace

import torch

from vlmq_vllm.offline.linears import linears_of
from vlmq_vllm.offline.plan.load import FLOAT, Load
from vlmq_vllm.offline.plan.solving import moments_bytes, stages_of, working_bytes
from vlmq_vllm.offline.saliency.weighing import weighted_linears
from vlmq_vllm.offline.settings import Settings
from vlmq_vllm.offline.source import RESIDENT, Source
from vlmq_vllm.offline.units import Unit, stored_bytes

# The interpreter with torch, transformers, the skeleton of a model, a processor and what kernels keep, as measured on
# small models with torch 2.13 for CPU and transformers 5.19. CUDA's own libraries come on top of it.
LIBRARIES = 840_000_000
AROUND = 1 << 16  # bytes that the kernel maps around a row of a file that is read
# tensors of a token that are alive at once, counted in the forward passes of Qwen2's layers and tower
ATTENTION_GRAPH, MLP_GRAPH, MLP = 12, 5, 3


@dataclass
class Phase:
    """Bytes by what they are for, in the host's memory and on the device."""

    name: str
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)


def find_phases(
    source: Source, settings: Settings, units: list[Unit], rest: dict[str, list[str]], load: Load, exact: bool
) -> list[Phase]:
    """The phases of a run. `exact`: the device is a CPU: factors in float64."""
    phases = []
    if load.samples:
        moved = any(unit.component != "language" for unit in units)
        phases += [_prepare(load), _capture(source, settings, load, moved, exact), _replay(source, load, exact)]
    for component in ("vision", "connector", "language"):
        own = [unit for unit in units if unit.component == component]
        if own:
            largest = max(own, key=lambda unit: _numel(source.model.get_submodule(unit.module)))
            phases += _walk(source, settings, largest, load, exact)
    phases.append(_write(source, rest))
    return phases


def _prepare(load: Load) -> Phase:
    """`_Run._prepare`: the samples' pixel values and, while they are put together, those of the batches."""
    return Phase("prepare samples", {"pixels of samples and batches": 2 * load.total * load.pixels})


def _front(source: Source, load: Load, exact: bool) -> Phase:
    """`Source.front` with one batch in the tower: embeddings, tower (block by block if it is large), connectors."""
    family, model = source.family, source.model
    tower, blocks = model.get_submodule(family.vision), list(model.get_submodule(family.blocks))
    resident = FLOAT * _numel(tower)
    if exact and resident > RESIDENT:
        resident -= FLOAT * (sum(map(_numel, blocks)) - max(map(_numel, blocks)))
    outside = [name for name in family.connectors if not name.startswith(family.vision + ".")]
    resident += sum(FLOAT * _numel(model.get_submodule(name)) for name in outside)
    patches, (inner, width) = load.batch * load.patches, _widest(blocks[0])
    phase = Phase("", {"pixels of batches": load.total * load.pixels})
    phase.device = {
        "embeddings": _embeddings(source, load),
        "vision tower and connector": resident,
        "activations of the tower": patches * FLOAT * (ATTENTION_GRAPH // 2 * width + MLP * inner)
        + load.batch * load.pixels,
    }
    return phase


def _embeddings(source: Source, load: Load) -> int:
    """The table as stored. It is a mapped file, of which only rows that occur get into memory."""
    name = source.places[f"{source.family.embed}.weight"].tensor
    return min(stored_bytes(source, name), load.total * AROUND)


def _capture(source: Source, settings: Settings, load: Load, moved: bool, exact: bool) -> Phase:
    """`_Run._walk` for the decoder: the front, and the streams that have been caught. Both streams are one set of
    tensors until a layer has run, unless the tower has been quantised and the front runs twice (`moved`)."""
    phase = _front(source, load, exact)
    count = 2 if moved and _paired(settings, "language") else 1
    phase.name = "capture inputs"
    phase.device["streams"] = count * load.total * (_hidden(source) * FLOAT * (1 + load.terms) + load.kept)
    return phase


def _replay(source: Source, load: Load, exact: bool) -> Phase:
    """`check_replay` on one sample: the front, one decoder layer, and the activations twice."""
    phase = _front(source, replace(load, samples=1), exact)
    phase.host["pixels of batches"] = load.total * load.pixels
    layer = max(source.layers(), key=_numel)
    inner, width = _widths(source, "language", layer, load)
    phase.name = "check the replay"
    phase.device |= {
        "layer in float32": FLOAT * _numel(layer),
        "activations of a sample": load.tokens * FLOAT * (2 * (1 + load.terms) * width + MLP * inner),
    }
    return phase


def _walk(source: Source, settings: Settings, unit: Unit, load: Load, exact: bool) -> list[Phase]:
    """`Walk.layer` at one unit: weigh tokens, then per stage collect moments and solve, beside the streams."""
    component, layer = unit.component, source.model.get_submodule(unit.module)
    shapes = {name: tuple(layer.get_submodule(name).weight.shape) for name in linears_of(layer)}
    weighted = _weighted(source, settings, component, list(shapes))
    pictured = component != "language"  # then inputs are patches, and the samples are needed for what comes later
    tokens, batch = (count * (load.patches if pictured else 1) for count in (load.total, load.batch))
    host = {"pixels of batches": load.total * load.pixels} if pictured else {}
    inner, width = _widths(source, component, layer, load)
    streams = tokens * width * FLOAT * (2 if _paired(settings, component) else 1)
    streams += tokens * load.kept + (0 if pictured else tokens * load.terms * width * FLOAT)
    held = {"streams": streams, "layer in float32": FLOAT * _numel(layer)}
    if settings.method == "rtn":
        biggest = max(math.prod(shape) for shape in shapes.values())
        replaced = FLOAT * sum(math.prod(shape) for shape in shapes.values())
        return [Phase(f"{component}: round", host, held | {"originals": replaced, "codes": 4 * FLOAT * biggest})]
    phases = []
    if weighted:
        graph = ATTENTION_GRAPH * width + (MLP_GRAPH * inner if settings.saliency_scope == "all" else 0)
        phases.append(Phase(f"{component}: weigh tokens", host, held | {"gradients": batch * FLOAT * graph}))
    replaced = 0  # originals stay until both streams have moved on
    for stage in stages_of(shapes, weighted):
        moved = settings.residual and not stage.several  # no residual between the streams of several experts
        base = settings.base if moved else "gptq"
        now = held | {"originals": replaced, "moments": moments_bytes(stage.problems, base)}
        columns = max(problem.columns for problem in stage.problems)
        # beside the layer's own: weighted inputs, and for a residual the other stream's inputs and the difference
        copies = (1 if weighted else 0) + (2 if moved else 0)
        activations = batch * FLOAT * (MLP * inner + width + copies * columns)
        solving = {"solver": working_bytes(stage.problems, base, exact, settings.act_order == "static")}
        phases += [
            Phase(f"{component}: collect moments", host, now | {"activations of a batch": activations}),
            Phase(f"{component}: solve", host, now | solving),
        ]
        replaced += sum(problem.weight for problem in stage.problems)
    return phases


def _write(source: Source, rest: dict[str, list[str]]) -> Phase:
    """`Writer.add` of unquantised tensors: one file of them, mapped from the source and from what is read back."""
    largest = max((sum(stored_bytes(source, name) for name in names) for names in rest.values()), default=0)
    return Phase("write what is left", {"tensors and their copy": 2 * largest})


def _paired(settings: Settings, component: str) -> bool:
    """Whether a full-precision stream runs beside the quantised one, as `_Run._walk` decides."""
    weighted = settings.method == "vlmq" and component == "language"
    return weighted or settings.residual


def _weighted(source: Source, settings: Settings, component: str, linears: list[str]) -> set[str]:
    """The linears with token weights."""
    if settings.method != "vlmq" or component != "language":
        return set()
    return set(weighted_linears(source.family, linears, settings.saliency_scope))


def _widths(source: Source, component: str, layer: torch.nn.Module, load: Load) -> tuple[int, int]:
    """Inner and outer width per token of a component's layer, for a connector (which joins patches) per patch."""
    inner, _ = _widest(layer)
    if component == "language":
        return inner, _hidden(source)
    tower = _widest(source.model.get_submodule(source.family.blocks)[0])[1]
    return (-(-inner // load.patches) if component == "connector" else inner), tower


def _widest(layer: torch.nn.Module) -> tuple[int, int]:
    """The greatest and the least number of columns of a layer's linears."""
    columns = [layer.get_submodule(name).in_features for name in linears_of(layer)]
    return max(columns), min(columns)


def _hidden(source: Source) -> int:
    return source.model.config.get_text_config().hidden_size


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
