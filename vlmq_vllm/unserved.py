"""Says which linear layers vLLM builds without a quantisation config, by model family: they cannot be quantised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unserved:
    """A rule for some linears.

    pattern: matches the end of a linear's name, in memory or in the files. tower: only for a vision tower of this model
    type. odd_sizes_only: only where an input or output size is not a multiple of 64.
    """

    pattern: str
    reason: str
    tower: str = ""
    odd_sizes_only: bool = False


PLAIN = "vLLM builds it as a plain nn.Linear, which holds no packed weight"
PROJECTOR = Unserved(r"multi_modal_projector\.linear_[12]", PLAIN)
SIGLIP = Unserved(
    r"vision_tower\..*mlp\.fc[12]",
    "vLLM builds SigLIP's MLP unquantised when one of its sizes is no multiple of 64",
    tower="siglip",
    odd_sizes_only=True,
)
INTERNVL_TOWER = Unserved(r"vision_tower\..*", "vLLM builds InternVL's tower without a quantisation config")
# Families whose layers are all known by name (tests/fixtures/layers).
KNOWN: tuple[str, ...] = ("gemma3", "idefics3", "internvl", "llava", "llava_onevision", "qwen2_5_vl", "qwen2_vl")
KNOWN += ("qwen3_vl", "qwen3_vl_moe", "smolvlm")
RULES = {
    "llava": (SIGLIP,),
    "llava_onevision": (SIGLIP, PROJECTOR),
    "internvl": (INTERNVL_TOWER, PROJECTOR),
    "gemma3": (SIGLIP,),
}


def why_unserved(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> str | None:
    """Why vLLM takes no packed weight for the linear of that name and weight shape in a model of this config.json;
    None when it takes one, as far as the rules know."""
    vision = config.get("vision_config")
    tower = vision.get("model_type", "") if isinstance(vision, Mapping) else ""
    odd = any(size % 64 for size in shape)
    for rule in RULES.get(config.get("model_type", ""), ()):
        if rule.tower in tower and (odd or not rule.odd_sizes_only) and re.search(rule.pattern + "$", name):
            return rule.reason
    return None
