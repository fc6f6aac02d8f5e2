"""Memory of what comes before a layer is solved: token weights of every kind, and the search for channel scales."""

from vlmq_vllm.offline.methods.awq.losses import BYTES
from vlmq_vllm.offline.methods.saliency.answer_loss import LIMIT, ROWS
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import stored_bytes
from vlmq_vllm.offline.plan.memory.load import FLOAT, Load, expert_share
from vlmq_vllm.offline.plan.memory.phase import ATTENTION_GRAPH, MLP_GRAPH, Layer, Phase
from vlmq_vllm.offline.plan.memory.solving import ROUNDING, Stage
from vlmq_vllm.offline.settings.quantize import Settings

LOGITS, CAPPED = 4, 2  # tensors [tokens, vocabulary] of a cross-entropy and its gradient, and more for capped logits


def weighing(settings: Settings, layer: Layer, batch: int) -> dict[str, int]:
    """Device terms of weighing a layer's tokens in batches of `batch`; none by modality, which is known beforehand."""
    if settings.saliency == "vlmq":
        inner = layer.inner if settings.saliency_scope == "all" else 0
        return {"gradients": batch * FLOAT * (ATTENTION_GRAPH * layer.width + MLP_GRAPH * inner)}
    if settings.saliency == "qig":
        return {"rounded weights": layer.linears, "graphs of two modules": batch * _integrated(layer)}
    return {}


def _integrated(layer: Layer) -> int:
    """Bytes of a token in `path.integrated_gradients`: the module's graph with either weights, the path's ends, a point
    on it, its gradient and their sum."""
    return FLOAT * (2 * max(ATTENTION_GRAPH * layer.width, MLP_GRAPH * layer.inner) + 5 * layer.width)


def modalities(source: Source, layer: Layer, load: Load, streams: int) -> list[Phase]:
    """`modality.modality_ratios`: the loss behind the last layer, and its gradients back through the layers. `streams`:
    bytes of those that have been captured. The batches are dropped when the walk begins, behind this."""
    passed = FLOAT * layer.width
    kept = passed * (len(source.layers()) + 1)
    chunk = max(load.batch, min(load.total, LIMIT // kept))
    host = {"pixels of batches": load.total * load.pixels, "inputs of all layers": chunk * kept}
    held = {"streams": streams, "gradients": (load.total + chunk) * passed}
    back = {"layer in float32": layer.bytes, "graph of a layer": load.batch * layer.graph}
    return [
        Phase("modality: loss", host, held | _head(source, load)),
        Phase("modality: back through the layers", host, held | back),
    ]


def _head(source: Source, load: Load) -> dict[str, int]:
    """`answers._head`: the head is read as stored, becomes float32, and then gives ROWS tokens' logits at once."""
    text = source.model.config.get_text_config()
    name = "lm_head.weight" if "lm_head.weight" in source.places else f"{source.family.embed}.weight"
    count = LOGITS + (CAPPED if getattr(text, "final_logit_softcapping", None) else 0)
    logits = count * FLOAT * min(ROWS, load.batch) * text.vocab_size
    stored = stored_bytes(source, source.places[name].tensor)
    weight = FLOAT * text.vocab_size * text.hidden_size
    return {"head in float32": weight, "logits, or the head as stored": max(logits, stored)}


def searching(source: Source, layer: Layer, stage: Stage, load: Load) -> dict[str, int]:
    """Device terms of `losses.candidate_losses` for a stage: inputs and outputs of inspected modules until they reach
    BYTES, a group with rounded weights, and what a batch needs on its way through a module."""
    share = expert_share(source) if stage.several else 1
    seen = sum(one.columns + (layer.width if one.linears > 1 else one.rows) for one in stage.problems)
    call = int(FLOAT * share * seen)  # of a token
    largest = max(problem.weight for problem in stage.problems)
    return {
        "captured calls": min(load.total * call, BYTES + load.batch * call),
        "rounded weights": largest + ROUNDING * min(largest, layer.biggest),
        "activations of a batch": load.batch * (layer.activations + 3 * FLOAT * layer.width),
    }
