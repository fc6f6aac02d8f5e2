"""Model families as rows: where a model's parts are. Which linears share an input is seen in its forward (`stages.py`).

Module names are those of transformers in memory; the files' names come from transformers' own renaming rules
(`places.py`). A family is a row; nothing else knows about it.
"""

import re
from dataclasses import dataclass, replace

from vlmq_vllm.errors import RefusedError


@dataclass(frozen=True)
class Unserved:
    """Linears that vLLM builds without a quantisation config: a packed weight would find no place there.

    pattern: regular expression that matches the end of a linear's in-memory name. reason: why, for the user.
    tower: only for a vision tower of this model type. odd_sizes_only: only where an input or output size is not a
    multiple of 64.
    """

    pattern: str
    reason: str
    tower: str = ""
    odd_sizes_only: bool = False

    def holds(self, name: str, shape: tuple[int, ...], config: dict) -> bool:
        """Whether the linear of that in-memory name and weight shape is one of them, by the model's config.json."""
        if self.tower and self.tower not in config.get("vision_config", {}).get("model_type", ""):
            return False
        odd = any(size % 64 for size in shape)
        return bool(re.search(self.pattern + "$", name)) and (odd or not self.odd_sizes_only)


@dataclass(frozen=True)
class Family:
    """One row.

    layers: the decoder's ModuleList. embed: the input embeddings. vision: the tower; blocks: its ModuleList.
    connectors: modules between tower and decoder (they may lie inside the tower).
    attention: the attention module of a decoder layer. attention_end: the norm whose input is the attention block's
    output with its residual. unserved: see there.
    """

    layers: str
    embed: str
    vision: str
    blocks: str
    connectors: tuple[str, ...]
    attention: str = "self_attn"
    attention_end: str = "post_attention_layernorm"
    unserved: tuple[Unserved, ...] = ()


PLAIN = "vLLM builds it as a plain nn.Linear, which holds no packed weight"
SIGLIP = Unserved(
    r"vision_tower\..*mlp\.fc[12]",
    "vLLM builds SigLIP's MLP unquantised when one of its sizes is no multiple of 64",
    tower="siglip",
    odd_sizes_only=True,
)
QWEN2 = Family(
    layers="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    vision="model.visual",
    blocks="model.visual.blocks",
    connectors=("model.visual.merger",),
)
QWEN3 = Family(
    layers="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    vision="model.visual",
    blocks="model.visual.blocks",
    connectors=("model.visual.merger", "model.visual.deepstack_merger_list"),
)
LLAVA = Family(
    layers="model.language_model.layers",
    embed="model.language_model.embed_tokens",
    vision="model.vision_tower",
    blocks="model.vision_tower.encoder.layers",
    connectors=("model.multi_modal_projector",),
    unserved=(SIGLIP,),
)
LLAVA_ONEVISION = replace(LLAVA, unserved=(SIGLIP, Unserved(r"multi_modal_projector\.linear_[12]", PLAIN)))
INTERNVL = replace(
    LLAVA,
    blocks="model.vision_tower.encoder.layer",
    unserved=(
        Unserved(r"vision_tower\..*", "vLLM builds InternVL's tower without a quantisation config"),
        Unserved(r"multi_modal_projector\.linear_[12]", PLAIN),
    ),
)
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
    "llava_onevision": LLAVA_ONEVISION,
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
    if model_type not in FAMILIES and not any("vision" in key for key in config):
        raise RefusedError(
            f"model type {model_type!r} is a text-only model (no key of config.json speaks of vision); "
            "vlmq quantises vision-language models, use a text quantiser such as llm-compressor"
        )
    if model_type not in FAMILIES:
        raise RefusedError(f"model type {model_type!r} is not supported yet; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
