"""Memory of what comes before the walks: samples, the model's front, captured inputs, the check of the replay."""

from dataclasses import replace

from vlmq_vllm.offline.model.source import RESIDENT, Source
from vlmq_vllm.offline.model.targets import stored_bytes
from vlmq_vllm.offline.plan.memory.load import FLOAT, Load
from vlmq_vllm.offline.plan.memory.phase import ATTENTION_GRAPH, MLP, Phase, layer_of, numel, widest

AROUND = 1 << 16  # bytes that the kernel maps around a row of a file that is read


def preparing(load: Load) -> Phase:
    """`read_samples`: the samples' pixel values and, while they are put together, those of the batches."""
    return Phase("prepare samples", {"pixels of samples and batches": 2 * load.total * load.pixels})


def front(source: Source, load: Load, exact: bool) -> Phase:
    """`Source.front` with one batch in the tower: embeddings, tower (block by block if it is large), connectors."""
    family, model = source.family, source.model
    tower, blocks = model.get_submodule(family.vision), list(model.get_submodule(family.blocks))
    resident = FLOAT * numel(tower)
    if exact and resident > RESIDENT:
        resident -= FLOAT * (sum(map(numel, blocks)) - max(map(numel, blocks)))
    outside = [name for name in family.connectors if not name.startswith(family.vision + ".")]
    resident += sum(FLOAT * numel(model.get_submodule(name)) for name in outside)
    patches, (inner, width) = load.batch * load.patches, widest(blocks[0])
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


def capturing(source: Source, component: str, load: Load, streams: int, exact: bool) -> Phase:
    """`Walks._streams`: the front, and `streams` bytes that have been caught. Those of other components are gone."""
    phase = front(source, load, exact)
    phase.name = f"{component}: capture inputs"
    if component == "vision":
        phase.device["activations of the tower"] = load.batch * load.pixels  # stubs are in the place of its blocks
    phase.device["streams"] = streams
    return phase


def replaying(source: Source, load: Load, exact: bool) -> Phase:
    """`check_replay` on one sample: the front, one decoder layer, and the activations twice."""
    phase = front(source, replace(load, samples=1), exact)
    phase.host["pixels of batches"] = load.total * load.pixels
    layers = source.layers()
    number = max(range(len(layers)), key=lambda i: numel(layers[i]))
    layer = layer_of(source, "language", f"{source.family.layers}.{number}", load)
    phase.name = "check the replay"
    phase.device |= {
        "layer in float32": layer.bytes,
        "activations of a sample": load.tokens * FLOAT * (2 * (1 + load.terms) * layer.width + MLP * layer.inner),
    }
    return phase
