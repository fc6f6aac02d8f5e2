"""Memory of Q-VLM: blocks of decoder layers that are searched together, and the tower's bounds that are learnt."""

from vlmq_vllm.offline.methods.qvlm.block_quantizer import ENTROPY_BITS
from vlmq_vllm.offline.methods.qvlm.blocks import DEPTH
from vlmq_vllm.offline.methods.qvlm.entropy import CHUNK
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.plan.memory.front import front
from vlmq_vllm.offline.plan.memory.load import FLOAT, Load
from vlmq_vllm.offline.plan.memory.phase import Layer, Phase
from vlmq_vllm.offline.plan.memory.solving import ROUNDING
from vlmq_vllm.offline.plan.memory.streams import Streams

ASSIGNED = 5  # tensors of soft assignments at once, counted in `entropy.joint_table`
ROUNDED = 4  # tensors of a weight's size in the graph of `bounds.clip_groups`
STEERED = 4  # hidden states and gradients at every layer of a batch in `decoder.effect_of`


def searching_blocks(source: Source, layer: Layer, load: Load, streams: Streams) -> list[Phase]:
    """`BlockQuantizer`: entropies from one pass over full-precision streams, then the search of a block. The batches
    are dropped between the two."""
    depth, states = min(DEPTH, len(source.layers())), streams.states
    pixels = {"pixels of batches": load.total * load.pixels}
    kept = {"what streams keep": streams.beside}
    passing = {"activations of a batch": load.batch * layer.activations}
    measured = {
        # in front of the stack, and in front of and behind a layer
        "hidden states": (4 if streams.apart else 3) * states,
        "layer in float32": layer.bytes,
        "soft assignments": ASSIGNED * FLOAT * min(CHUNK, load.batch * layer.width << ENTROPY_BITS),
    }
    # full-precision targets behind each layer of a block; the choice in front of each, the best two that are tried, and
    # what is computed
    searched = {
        "hidden states": (2 * depth + 3) * states,
        "layers in float32": depth * layer.bytes,
        "rounded weights": depth * layer.linears,
        "codes": layer.linears // FLOAT + ROUNDING * layer.biggest,
    }
    return [
        Phase("language: measure entropies", pixels, kept | passing | measured),
        Phase("language: search a block", {}, kept | passing | searched),
    ]


def learning_bounds(source: Source, layer: Layer, decoder: Layer, blocks: int, load: Load, exact: bool) -> list[Phase]:
    """`TowerQuantizer`: the decoder's states of all batches, for their ranges, then gradients batch by batch.

    layer: of the tower, of which `blocks` are learnt at once. decoder: a layer of it.
    """
    state, count = FLOAT * decoder.width, len(source.layers()) + 1
    depth = len(source.model.get_submodule(source.family.blocks))
    measured = {"states behind all layers": load.total * count * state}
    learnt = {
        "states at both ends": 2 * load.total * state,
        "states behind all layers": STEERED * load.batch * count * state,
        "graph of rounded weights": ROUNDED * blocks * layer.linears,
        "graph of the tower": load.batch * load.patches * depth * layer.graph,
        "graph of a layer": load.batch * decoder.graph,
    }
    phases = []
    for name, terms in (("measure states", measured), ("learn bounds", learnt)):
        phase = front(source, load, exact)
        phase.name = f"vision: {name}"
        phase.device |= {"weights and zero points": 2 * blocks * layer.linears, "layer in float32": decoder.bytes}
        phase.device |= terms
        phases.append(phase)
    return phases
