"""Model families as rows: where the decoder layers are and which linears share an input, in the order of the forward.

Module names are those of transformers in memory; the files' names come from transformers' own renaming rules
(`source.py`). A family is a row; nothing else knows about it.
"""

from dataclasses import dataclass

from vlmq_vllm.errors import QuantizeError

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_GROUPS = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


@dataclass(frozen=True)
class Family:
    """One row.

    layers: the decoder's ModuleList. front: modules that run before it, in memory only while inputs are captured.
    groups: linears of a layer that read the same activations, in the order in which they run.
    attention, attention_norm: the attention module of a layer and the norm before it, inside the residual branch.
    weighted: linears whose tokens are weighted by saliency (VLMQ: those of the attention).
    """

    layers: str
    front: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = LLAMA_GROUPS
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    weighted: tuple[str, ...] = (*QKV, "self_attn.o_proj")


FAMILIES = {
    "qwen2_vl": Family(
        layers="model.language_model.layers",
        front=("model.visual", "model.language_model.embed_tokens"),
    ),
}


def family_of(config: dict) -> Family:
    """The row of a model's config.json. Raises QuantizeError for quantised, text-only and unknown models."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if found := part.get("quantization_config"):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise QuantizeError(f"the model is already quantised (quant_method {method!r}); start from its original")
    model_type = config.get("model_type")
    if model_type not in FAMILIES and not any("vision" in key for key in config):
        raise QuantizeError(
            f"model type {model_type!r} is a text-only model (no key of config.json speaks of vision); "
            "vlmq quantises vision-language models, use a text quantiser such as llm-compressor"
        )
    if model_type not in FAMILIES:
        raise QuantizeError(f"model type {model_type!r} is not supported yet; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
