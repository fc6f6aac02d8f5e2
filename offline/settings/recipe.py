"""Reads recipes, which are YAML files of settings, and adds what the command line says."""

from pathlib import Path
from types import NoneType

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.option import Option, options_of
from vlmq_vllm.offline.settings.quantize import Settings


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

    Raises QuantizeError for a key of the recipe that does not exist and for a value of another type.
    """
    declared = options_of(Settings)
    if recipe.get("base") == "aligned":  # as QEP was called in recipes of version 0.1
        if recipe.get("saliency_cap") or recipe.get("saliency_floor"):
            raise QuantizeError(
                "the recipe is of version 0.1 (base: aligned), in which saliency_cap and saliency_floor were multiples "
                "of the mean; they are of the median now: write base: qep and choose them anew"
            )
        recipe = recipe | {"base": "qep"}
    for key, value in recipe.items():
        if key not in declared:
            raise QuantizeError(f"the recipe has the key {key!r}; there are {', '.join(declared)}")
        allowed = types_of(declared[key])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
            raise QuantizeError(f"the recipe's {key} is {value!r}; it must be of type {wanted}")
    return Settings(**recipe | {key: value for key, value in options.items() if key in declared})


def types_of(declared: Option) -> tuple[type, ...]:
    """The types that a value may have in YAML: a whole number may stand for a float, null for a default left open."""
    allowed = (declared.type, int) if declared.type is float else (declared.type,)
    return (*allowed, NoneType) if declared.default is None else allowed
