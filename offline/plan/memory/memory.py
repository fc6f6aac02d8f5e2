"""Predicted peak memory of `vlmq quantize`: one function per phase, each term named after what it holds.

A phase gives what lies in the host's memory whatever the device is (pixel values, files) and what lies on the device
(streams, weights in float32, moments, the solver's working set). On a CPU both are one memory. What comes before the
walks is in `front.py`, streams in `streams.py`, token weights and channel scales in `weighing.py`, Q-VLM in `joint.py`;
here are the run's phases and the solving of a layer.
"""

from vlmq_vllm.offline.methods.saliency.vlmq import weighted_linears
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import ORDER, Unit, stored_bytes
from vlmq_vllm.offline.plan.memory.front import capturing, preparing, replaying
from vlmq_vllm.offline.plan.memory.joint import learning_bounds, searching_blocks
from vlmq_vllm.offline.plan.memory.load import FLOAT, Load
from vlmq_vllm.offline.plan.memory.phase import Layer, Phase, layer_of, numel
from vlmq_vllm.offline.plan.memory.solving import (
    ROUNDING,
    Stage,
    moments_bytes,
    rounding_bytes,
    stages_of,
    working_bytes,
)
from vlmq_vllm.offline.plan.memory.streams import Streams, find_streams
from vlmq_vllm.offline.plan.memory.weighing import modalities, searching, weighing
from vlmq_vllm.offline.settings.quantize import KEPT, Settings

# The interpreter with torch, transformers, the skeleton of a model, a processor and what kernels keep, as measured on
# small models with torch 2.13 for CPU and transformers 5.19. CUDA's own libraries come on top of it.
LIBRARIES = 840_000_000
ROUNDED_INPUTS = 2  # tensors of a linear's input at once where it is rounded

Terms = dict[str, int]


def find_phases(
    source: Source, settings: Settings, units: list[Unit], rest: dict[str, list[str]], load: Load, exact: bool
) -> list[Phase]:
    """The phases of a run. `exact`: the device is a CPU: factors in float64."""
    phases = []
    if load.samples:
        phases += [preparing(load), replaying(source, load, exact)]
    moved = any(unit.component != "language" for unit in units)
    for component in ORDER:
        own = [unit for unit in units if unit.component == component]
        if not own:
            continue
        largest = max(own, key=lambda unit: numel(source.model.get_submodule(unit.module)))
        layer = layer_of(source, component, largest.module, load)
        streams = find_streams(settings, component, layer.width, load, moved)
        if load.samples and (component == "language" or settings.row.solves):
            phases.append(capturing(source, component, load, streams.captured, exact))
        if component == "language" and settings.saliency == "modality":
            phases += modalities(source, layer, load, streams.captured)
        if settings.row.joint and component == "vision":
            decoder = layer_of(source, "language", f"{source.family.layers}.0", load)
            phases += learning_bounds(source, layer, decoder, len(own), load, exact)
        elif settings.row.joint and component == "language":
            phases += searching_blocks(source, layer, load, streams)
        elif not settings.row.solves:
            phases.append(_round(component, layer, settings, load))
        else:
            phases += _walk(source, settings, component, layer, load, streams, exact)
    phases.append(_write(source, rest))
    return phases


def _round(component: str, layer: Layer, settings: Settings, load: Load) -> Phase:
    """`Walk.layer` without streams: every linear is rounded as it comes. Originals stay until the layer is done."""
    host = {"pixels of batches": load.total * load.pixels} if load.samples else {}
    held = {"streams": 0, "layer in float32": layer.bytes, "originals": layer.linears}
    return Phase(f"{component}: round", host, held | {"codes": ROUNDING * layer.biggest})


def _walk(
    source: Source, settings: Settings, component: str, layer: Layer, load: Load, streams: Streams, exact: bool
) -> list[Phase]:
    """`Walk.layer` at one layer: weigh tokens, search scales, then per stage collect and solve, beside the streams."""
    decoder = component == "language"
    batch = load.batch * (1 if decoder else load.patches)  # of patches where inputs are patches
    host = {} if decoder else {"pixels of batches": load.total * load.pixels}  # needed for what comes later
    held = {"streams": streams.walking, "layer in float32": layer.bytes}
    stages = stages_of(layer.shapes, _apart(source, settings, component, layer))
    phases = []
    if decoder and (terms := weighing(settings, layer, batch)):
        phases.append(Phase(f"{component}: weigh tokens", host, held | terms))
    scaled = decoder and settings.row.scales_channels
    replaced = 0  # originals stay until both streams have moved on
    for stage in stages if scaled else ():
        searched = held | {"originals": replaced} | searching(source, layer, stage, load)
        phases.append(Phase(f"{component}: search scales", host, searched))
        replaced += _weights(stage)
    for stage in stages:
        now = held | {"originals": replaced}
        for name, terms in _stage(settings, decoder, layer, stage, batch, exact).items():
            phases.append(Phase(f"{component}: {name}", host, now | terms))
        replaced += _weights(stage) if settings.sequential and not scaled else 0
    return phases


def _stage(settings: Settings, decoder: bool, layer: Layer, stage: Stage, batch: int, exact: bool) -> dict[str, Terms]:
    """A stage's moments with what collecting and solving need beside them."""
    moved = settings.residual and not stage.several  # no residual between the streams of several experts
    base = settings.base if moved else "gptq"
    moments = {"moments": moments_bytes(stage.problems, base)}
    # beside the layer's own: weighted inputs (AWQ weights its search for scales alone), and for a residual the other
    # stream's inputs and the difference
    weighted = decoder and settings.saliency != "none" and settings.row.compensates
    copies = (1 if weighted else 0) + (2 if moved else 0)
    copies += ROUNDED_INPUTS if settings.activation_bits != KEPT else 0
    columns = max(problem.columns for problem in stage.problems)
    if settings.row.scales_channels:
        solver = rounding_bytes(stage.problems)
    else:
        solver = working_bytes(stage.problems, base, exact, settings.act_order == "static")
    return {
        "collect moments": moments | {"activations of a batch": batch * (layer.activations + copies * FLOAT * columns)},
        "solve": moments | {"solver": solver},
    }


def _weights(stage: Stage) -> int:
    return sum(problem.weight for problem in stage.problems)


def _apart(source: Source, settings: Settings, component: str, layer: Layer) -> set[str]:
    """The linears with token weights of their own."""
    if settings.saliency != "vlmq" or component != "language":
        return set()
    return set(weighted_linears(source.family, list(layer.shapes), settings.saliency_scope))


def _write(source: Source, rest: dict[str, list[str]]) -> Phase:
    """`Writer.add` of unquantised tensors: one file of them, mapped from the source and from what is read back."""
    largest = max((sum(stored_bytes(source, name) for name in names) for names in rest.values()), default=0)
    return Phase("write what is left", {"tensors and their copy": 2 * largest})
