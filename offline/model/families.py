"""The table of model families: where a model's parts are. Which linears share an input is seen in its forward
(`groups.py`).

Module names are those of transformers in memory; the files' names come from transformers' own renaming rules
(`file_names.py`). Which linears vLLM does not take is in the plugin's `vlmq_vllm/unserved.py`.
"""

from dataclasses import dataclass, replace

from vlmq_vllm.errors import RefusedError


@dataclass(frozen=True)
class Family:
    """A row. layers: the decoder's ModuleList. embed: the input embeddings. vision: the tower; blocks: its ModuleList.
    connectors: modules between tower and decoder (they may lie inside the tower). attention: the attention module of a
    decoder layer. attention_end: the norm whose input is the attention block's output with its residual."""

    layers: str
    embed: str
    vision: str
    blocks: str
    connectors: tuple[str, ...]
    attention: str = "self_attn"
    attention_end: str = "post_attention_layernorm"

    def in_attention(self, linear: str) -> bool:
        """Whether a linear, by its name in a decoder layer, belongs to the attention module."""
        return linear.startswith(f"{self.attention}.")


QWEN2 = Family(
    layers="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    vision="model.visual",
    blocks="model.visual.blocks",
    connectors=("model.visual.merger",),
)
QWEN3 = replace(QWEN2, connectors=("model.visual.merger", "model.visual.deepstack_merger_list"))
LLAVA = Family(
    layers="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    vision="model.vision_tower",
    blocks="model.vision_tower.encoder.layers",
    connectors=("model.multi_modal_projector",),
)
INTERNVL = replace(LLAVA, blocks="model.vision_tower.encoder.layer")
GEMMA3 = replace(LLAVA, attention_end="pre_feedforward_layernorm")
IDEFICS = Family(
    layers="model.text_model.layers",
    embed="model.text_model.embed_tokens",
    vision="model.vision_model",
    blocks="model.vision_model.encoder.layers",
    connectors=("model.connector",),
)

FAMILIES = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "llava": LLAVA,
    "llava_onevision": LLAVA,
    "internvl": INTERNVL,
    "gemma3": GEMMA3,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
}


def family_of(config: dict) -> Family:
    """The row of a model's config.json. Raises RefusedError for quantised, text-only and unknown models."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if found := part.get("quantization_config"):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise RefusedError(f"the model is already quantised (quant_method {method!r}); start from its original")
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if not any("vision" in key for key in config):
        raise RefusedError(
            f"model type {model_type!r} is a text-only model (no key of config.json speaks of vision); "
            "vlmq quantises vision-language models, use a text quantiser such as llm-compressor"
        )
    raise RefusedError(f"model type {model_type!r} is not supported yet; supported: {', '.join(sorted(FAMILIES))}")
