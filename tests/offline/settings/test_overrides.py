"""Exceptions by module: which linear gets which format, and checkpoints of mixed widths."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import family_models
from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import QuantizeError, RefusedError, StoppedError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.headers import read_headers
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import find_targets, find_units
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings

MIXED = {
    "model.layers.*.mlp.down_proj": 2,
    "model.layers.1.*": 16,
    "model.layers.2.self_attn.k_proj": {"bits": 8, "group_size": -1},
    "model.layers.2.self_attn.v_proj": {"symmetric": True},
    "visual.blocks.3.*": 4,
}


def test_last_pattern_wins():
    settings = Settings(bits=3, modules={"a.*": 4, "a.b": {"group_size": 64}, "a.c": 16, "a.c.d": 2})
    assert settings.format_for("language", "x") == WeightFormat(3, 128, False)
    assert settings.format_for("language", "a.b") == WeightFormat(4, 64, False)
    assert settings.format_for("language", "a.c") is None
    assert settings.format_for("language", "a.c.d") == WeightFormat(2, 128, False)
    assert settings.format_for("vision", "a.e") == WeightFormat(4, 128, False)
    assert settings.format_for("vision", "x") is None


@pytest.mark.parametrize("value", [5, "4", {}, {"bits": 4, "zeros": 1}, {"group_size": 40}, None, 2.5, True])
def test_no_format(value):
    with pytest.raises(QuantizeError, match="'model.layers.0.*'"):
        Settings(modules={"model.layers.0.*": value})


@pytest.mark.parametrize("method", ["rtn", "vlmq"])
def test_written_as_said(demo_model, calibration, tmp_path, method):
    settings = Settings(bits=3, group_size=64, method=method, modules=MIXED, samples=2)
    quantize(str(demo_model), tmp_path / "out", calibration, settings)
    found = {name: module.format for name, module in read_modules(tmp_path / "out").items()}
    assert not any("layers.1." in name for name in found) and len(found) == 3 * 7 + 4
    assert found["model.layers.0.mlp.up_proj"] == WeightFormat(3, 64, False)
    assert found["model.layers.0.mlp.down_proj"] == WeightFormat(2, 64, False)
    assert found["model.layers.2.self_attn.q_proj"] == WeightFormat(3, 64, False)
    assert found["model.layers.2.self_attn.k_proj"] == WeightFormat(8, -1, False)
    assert found["model.layers.2.self_attn.v_proj"] == WeightFormat(3, 64, True)
    assert {name for name in found if name.startswith("visual")} == {
        f"visual.blocks.3.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    dequantize(tmp_path / "out", tmp_path / "twin")
    original, twin = (load_whole(folder) for folder in (demo_model, tmp_path / "twin"))
    assert original.keys() == twin.keys()
    changed = {name.removesuffix(".weight") for name in original if not torch.equal(original[name], twin[name])}
    assert changed == found.keys()
    recipe = yaml.safe_load((tmp_path / "out/vlmq_recipe.yaml").read_text())
    assert recipe["modules"] == MIXED and list(recipe["modules"]) == list(MIXED)


def load_whole(folder) -> dict[str, torch.Tensor]:
    return {
        k: v
        for file in {info.file for info in read_headers(folder).values()}
        for k, v in load_file(folder / file).items()
    }


def test_recipe_file(vlmq, demo_model, tmp_path):
    """The order of patterns in the file counts, and the command line wins over its other lines."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"bits": 4, "method": "rtn", "modules": MIXED}, sort_keys=False))
    code, out, _ = vlmq("plan", demo_model, "--recipe", recipe, "--group-size", 64, "--json")
    kinds = json.loads(out)["linears"]
    assert code == 0 and {kind["bits"] for kind in kinds} == {2, 4, 8}
    assert {kind["group_size"] for kind in kinds} == {64, -1}


def test_pattern_that_names_nothing(demo_model):
    source, settings = Source(demo_model), Settings(modules={"model.layers.9.*": 4})
    with pytest.raises(QuantizeError, match=r"'model.layers.9.\*' names no linear.*model\.layers\.0\."):
        find_targets(source, settings, find_units(source, settings))


def test_nothing_left(demo_model):
    source, settings = Source(demo_model), Settings(modules={"model.layers.*": 16})
    with pytest.raises(RefusedError, match="nothing is left"):
        find_targets(source, settings, find_units(source, settings))


def test_experts_stay_together(tmp_path):
    family_models.build("qwen3_vl_moe", tmp_path)
    source = Source(tmp_path)
    name = next(place.module for place in source.places.values() if place.expert == 1 and "down" in place.module)
    experts = name.rpartition(".1.")[0]
    for pattern in (name, f"{experts}.*.gate_proj"):
        for bits in (4, 16):
            settings = Settings(group_size=-1, modules={pattern: bits})
            with pytest.raises(RefusedError, match="all experts of a layer"):
                find_targets(source, settings, find_units(source, settings))
    settings = Settings(group_size=-1, modules={f"{experts}.*.down_proj": 16, f"{experts}.*.*_proj": 4})
    targets = find_targets(source, settings, find_units(source, settings))
    assert {t.format.bits for t in targets if t.module.startswith(experts)} == {4}


def test_exception_without_bits_leaves_alone_what_is(demo_model):
    settings = Settings(
        bits=4, modules={"*proj": {"group_size": 32}, "model.layers.0.*": 16, "model.*.q_proj": {"symmetric": True}}
    )
    targets = find_targets(source := Source(demo_model), settings, find_units(source, settings))
    assert len(targets) == 3 * 7 and {target.component for target in targets} == {"language"}
    assert {target.format.group_size for target in targets} == {32}


def test_a_component_that_is_left_alone(demo_model, calibration, tmp_path):
    """A recipe may quantise the tower alone, or say once more that a component stays at 16 bits."""
    settings = Settings(bits=4, group_size=64, vision_bits=4, method="rtn", modules={"model.layers.*": 16})
    quantize(str(demo_model), tmp_path / "out", None, settings)
    assert all(name.startswith("visual.blocks.") for name in read_modules(tmp_path / "out"))
    settings = Settings(modules={"visual.*": 16})
    targets = find_targets(source := Source(demo_model), settings, find_units(source, settings))
    assert {target.component for target in targets} == {"language"}


METHODS = [
    {"method": "awq"},
    {"method": "awq", "base": "qep"},  # as in the recipe of another method: it is of no concern here
    {"method": "awq", "saliency": "qig", "activation_bits": 8},
    {"method": "gptq", "saliency": "modality", "base": "qep"},
    {"method": "qvlm"},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options.values())))
def test_exceptions_in_every_method(options, demo_model, tmp_path):
    """Whole layers, parts of fused layers and one tower block besides, in every method's walk."""
    from data import write

    modules = {"model.layers.1.*": 16, "*.2.self_attn.k_proj": 8, "*.3.mlp.down_proj": 16, "visual.blocks.3.mlp.fc1": 4}
    settings = Settings(bits=4, group_size=64, modules=modules, **options)
    quantize(str(demo_model), tmp_path / "out", write(tmp_path / "data", "calibration", 2), settings)
    found = {name: module.format.bits for name, module in read_modules(tmp_path / "out").items()}
    assert len(found) == 3 * 7 - 1 + 1 and found["model.layers.2.self_attn.k_proj"] == 8
    assert found["visual.blocks.3.mlp.fc1"] == 4 and "model.layers.3.mlp.down_proj" not in found


def test_order_of_exceptions_decides_what_is_resumed(demo_model, calibration, tmp_path):
    one = Settings(bits=4, group_size=64, method="rtn", modules={"*.q_proj": 2, "model.layers.0.*": 3})
    other = Settings(bits=4, group_size=64, method="rtn", modules={"model.layers.0.*": 3, "*.q_proj": 2})
    with pytest.raises(StoppedError):
        quantize(str(demo_model), tmp_path / "out", None, one, stop=iter([False, True]).__next__)
    with pytest.raises(RefusedError, match="had modules"):
        quantize(str(demo_model), tmp_path / "out", None, other, resume=True)
    quantize(str(demo_model), tmp_path / "out", None, one, resume=True)


def test_experts_take_inputs_as_they_are(tmp_path):
    family_models.build("qwen3_vl_moe", tmp_path)
    source = Source(tmp_path)
    settings = Settings(bits=4, group_size=-1, activation_bits=8)
    with pytest.raises(RefusedError, match="inputs of experts"):
        find_targets(source, settings, find_units(source, settings))
    settings = Settings(bits=4, group_size=-1, activation_bits=8, modules={"*.experts.*": 16})
    assert find_targets(source, settings, find_units(source, settings))


def test_impossible_group_is_told_first():
    with pytest.raises(QuantizeError, match="group_size is 7"):
        Settings(bits=4, group_size=7, activation_bits=8, modules={"a": 8})
