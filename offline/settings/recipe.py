"""Recipes: YAML files of settings, and what the command line adds to them."""

from dataclasses import fields
from pathlib import Path

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.quantize import Settings

PLAIN = (int, bool, dict)
# Settings that only some runs read, by the method or the token weights that do.
READERS = {
    "scale_loss": ("awq",),
    "base": ("gptq", "vlmq"),
    "alpha": ("gptq", "vlmq"),
    "damp": ("gptq", "vlmq"),
    "act_order": ("gptq", "vlmq"),
    "saliency_power": ("vlmq",),
    "saliency_scope": ("vlmq",),
    "saliency_fallback": ("vlmq",),
    "saliency_floor": ("vlmq",),
    "saliency_cap": ("vlmq",),
}


def read_recipe(path: Path) -> dict:
    """The settings in a YAML file. Raises QuantizeError when it cannot be read or is no mapping."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QuantizeError(f"cannot read the recipe {path} ({error}); give a YAML file of settings") from None
    if not isinstance(found, dict):
        raise QuantizeError(f"the recipe {path} holds no settings; write lines such as 'bits: 3'")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def settings_from(recipe: dict, options: dict) -> Settings:
    """Settings from a recipe and from options, which win; options that are no settings are passed over.

    Raises QuantizeError for a key of the recipe that does not exist and for a value of another kind.
    """
    kinds = {field.name: field.type for field in fields(Settings)}
    for key, value in recipe.items():
        if key not in kinds:
            raise QuantizeError(f"the recipe has the key {key!r}; there are {', '.join(kinds)}")
        allowed = (int, float) if "float" in str(kinds[key]) else kinds[key] if kinds[key] in PLAIN else str
        left_open = value is None and "None" in str(kinds[key])
        if not (isinstance(value, allowed) or left_open) or (type(value) is bool and kinds[key] is not bool):
            raise QuantizeError(f"the recipe's {key} is {value!r}; it must be of type {kinds[key]}")
    return Settings(**recipe | {key: value for key, value in options.items() if key in kinds})


def unread(settings: Settings, options: dict) -> list[str]:
    """Which of these options a run with these settings does not read."""
    found = (settings.method, settings.saliency)
    return [name for name in options if name in READERS and not set(READERS[name]) & set(found)]
