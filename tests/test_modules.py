"""Exceptions by module: which linear gets which format, and checkpoints of mixed widths."""

import json

import family_models
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.headers import read_headers
from vlmq_vllm.offline.dequantize import dequantize
from vlmq_vllm.offline.quantize import quantize
from vlmq_vllm.offline.settings import Settings
from vlmq_vllm.offline.source import Source
from vlmq_vllm.offline.units import find_targets, find_units

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
    settings = Settings(bits=3, group_size=64, method=method, modules=MIXED)
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
