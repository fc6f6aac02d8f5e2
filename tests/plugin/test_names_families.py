"""Names of every family at published depth, in old and new spelling: the layers that vLLM builds find their modules.

The lists were read from vLLM's own models, see fixtures/README.md; only the last tests need vLLM.
"""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from name_patterns import expand
from vlmq_vllm.names import ModuleTable
from vlmq_vllm.unserved import why_unserved

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = sorted(path.stem for path in (FIXTURES / "layers").glob("*.json"))
NAMINGS = ("old", "new")
# What decides in `vlmq_vllm/unserved.py` beside names: the tower's type, and sizes such as those of SigLIP so400m.
TOWERS = {"llava": "clip_vision_model", "llava_onevision": "siglip_vision_model", "gemma3": "siglip_vision_model"}
ODD_SIZE = (4304, 1152)
NOT_RUN = {"llava": "model.vision_tower.encoder.layers.23."}  # vision_feature_layer is -2, vLLM builds no more
families = pytest.mark.parametrize("family", FAMILIES)
namings = pytest.mark.parametrize("naming", NAMINGS)


def read(kind: str, family: str) -> dict:
    return json.loads((FIXTURES / kind / f"{family}.json").read_text())


def spelling(family: str, naming: str, kind: str = "linears") -> dict[str, str]:
    """Modules of a family: name in memory -> name in a checkpoint of that naming."""
    pairs = (pair for patterns in read("headers", family)[kind].items() for pair in expand(patterns))
    return {memory: memory if naming == "new" else published for memory, published in pairs}


def names(patterns: list[str]) -> set[str]:
    return {name for pattern in patterns for (name,) in expand((pattern,))}


def rename(rules: dict[str, dict[str, str]], name: str) -> str:
    """A tensor's name by rules of a fixture, as vLLM's WeightsMapper applies them."""
    for pattern, new in rules["regex"].items():
        name = re.sub(pattern, new, name)
    for old, new in rules["substr"].items():
        name = name.replace(old, new, 1)
    for old, new in rules["prefix"].items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
    for old, new in rules["suffix"].items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def tables(family: str, modules: list[str]):
    """For every stage of building the model: the table by then, vLLM's fused layers, and (layer, modules in memory)."""
    layers = read("layers", family)
    for stage in layers["stages"]:
        mappers = [lambda name, rules=rules: rename(rules, name) for rules in layers["mappers"][: stage["mappers"]]]
        groups = [group for prefix, made in stage["layers"].items() for group in expand((prefix, *made))]
        yield ModuleTable(modules, mappers), stage["packed"], groups


@families
@namings
def test_every_layer_finds_its_modules_and_no_others(family, naming):
    """With every module that owns a weight in the table: more than a checkpoint can have quantised."""
    linears, others = (spelling(family, naming, kind) for kind in ("linears", "others"))
    unclaimed = names(read("layers", family)["unclaimed"][naming])
    claimed = []
    for table, packed, groups in tables(family, [*linears.values(), *others.values()]):
        for prefix, *made in groups:
            experts = [name for name in linears if name.startswith(f"{made[0]}.") and made[0] not in linears]
            if experts:
                keys = [name.removeprefix(f"{made[0]}.").split(".") for name in experts]
                expected = {(int(i), part): linears[name] for name, (i, part) in zip(experts, keys, strict=True)}
                assert table.experts(prefix.removesuffix(".routed_experts")) == expected
            elif unclaimed.isdisjoint(made):
                assert table.shards(prefix, packed) == tuple((linears | others)[name] for name in made), prefix
            else:
                assert table.shards(prefix, packed) == (), prefix
            claimed += experts or [name for name in made if name in linears and name not in unclaimed]
    assert len(claimed) == len(set(claimed))
    assert set(claimed) | unclaimed == set(linears)
    assert not unclaimed & set(claimed)


@families
@namings
def test_layers_whose_linears_are_not_quantised_find_nothing(family, naming):
    """Norms, embeddings and convolutions alone: none of them is taken for a linear, a tied head not for lm_head."""
    others = spelling(family, naming, "others")
    for table, packed, groups in tables(family, list(others.values())):
        for prefix, *made in groups:
            assert table.shards(prefix, packed) == tuple(others[name] for name in made if name in others), prefix
            assert table.experts(prefix) == {}


@families
def test_what_no_layer_claims_is_known_beforehand(family):
    """Whatever the checkpoint, these could not be served quantised: the quantiser and the message ask
    `vlmq_vllm/unserved.py`."""
    config = {"model_type": family, "vision_config": {"model_type": TOWERS.get(family, "")}}
    linears = spelling(family, "old")
    told = {memory for memory, name in linears.items() if why_unserved(name, ODD_SIZE, config)}
    not_run = {memory for memory in linears if memory.startswith(NOT_RUN.get(family, "-"))}
    assert told | not_run == names(read("layers", family)["unclaimed"]["old"])


@families
def test_rules_are_those_of_the_installed_vllm(family):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.model_executor.models.utils import WeightsMapper

    layers = read("layers", family)
    module, _, name = layers["class"].rpartition(".")
    model = getattr(import_module(module), name)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    assert (mapper is None) == (not layers["mappers"])
    for rules in layers["mappers"][:1]:
        kinds = ("regex", "substr", "prefix", "suffix")
        found = {kind: getattr(mapper, f"orig_to_new_{kind}") for kind in kinds}
        plain = {kind: {getattr(old, "pattern", old): new for old, new in each.items()} for kind, each in found.items()}
        assert plain == rules
    for rules in layers["mappers"]:
        again = WeightsMapper(**{f"orig_to_new_{kind}": each for kind, each in rules.items()})
        for naming in NAMINGS:
            for module in spelling(family, naming).values():
                assert again._map_name(f"{module}.weight") == rename(rules, f"{module}.weight")
