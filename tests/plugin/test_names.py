"""Names: from a checkpoint's modules through vLLM's mappers to the layers that vLLM builds."""

import subprocess
import sys

import pytest

from vlmq_vllm.names import ModuleTable


def prefixes(rules: dict[str, str]):
    """A mapper that replaces prefixes one rule after the other, as vLLM's do."""

    def mapper(name: str) -> str | None:
        for old, new in rules.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        return name

    return mapper


QWEN2_VL = prefixes(
    {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    }
)
NOTHING = prefixes({})
ATTENTION = "language_model.model.layers.0.self_attn"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.mark.parametrize("parent", ["model.layers.0", "model.language_model.layers.0"], ids=["old names", "new names"])
def test_fused_layer_is_found_through_the_mapper(parent):
    modules = [f"{parent}.self_attn.{name}_proj" for name in "qkv"]
    found = ModuleTable(modules, [QWEN2_VL]).shards(f"{ATTENTION}.qkv_proj", PACKED)
    assert found == tuple(modules)


def test_fused_layer_is_found_without_vllms_table():
    modules = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert ModuleTable(modules, [QWEN2_VL]).shards("language_model.model.layers.0.mlp.gate_up_proj", {}) == tuple(
        modules
    )


def test_shard_that_is_not_quantised_is_none():
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    found = ModuleTable(modules, [QWEN2_VL]).shards(f"{ATTENTION}.qkv_proj", PACKED)
    assert found == (modules[0], None, modules[1])


def test_layer_without_quantised_shards_has_no_shards():
    table = ModuleTable(["model.layers.1.mlp.down_proj"], [QWEN2_VL])
    assert table.shards("language_model.model.layers.0.mlp.down_proj", PACKED) == ()
    assert table.shards(f"{ATTENTION}.qkv_proj", PACKED) == ()


def test_tensor_fused_on_disk_comes_before_its_parts():
    table = ModuleTable(["visual.blocks.0.attn.qkv"], [QWEN2_VL])
    assert table.shards("visual.blocks.0.attn.qkv", {"qkv": ["q", "k", "v"]}) == ("visual.blocks.0.attn.qkv",)


@pytest.mark.parametrize("prefix", ["lm_head", "language_model.lm_head"])
def test_head_is_found_under_both_prefixes(prefix):
    """The rule `lm_head.` matches tensor names only, and models disagree about the prefix they ask with."""
    assert ModuleTable(["lm_head"], [QWEN2_VL]).shards(prefix, {}) == ("lm_head",)
    assert ModuleTable(["lm_head"]).shards(prefix, {}) == ("lm_head",)


def test_two_heads_are_not_confused():
    table = ModuleTable(["talker.lm_head", "thinker.lm_head"])
    assert table.shards("lm_head", {}) == ()
    assert table.shards("talker.lm_head", {}) == ("talker.lm_head",)


def test_inner_mapper_does_not_hide_the_outer_names():
    inner = prefixes({"language_model.": "inner."})
    table = ModuleTable(["model.layers.0.mlp.down_proj"], [QWEN2_VL, inner, NOTHING])
    for prefix in ("language_model.model", "inner.model", "model"):
        assert table.shards(f"{prefix}.layers.0.mlp.down_proj", {}) == ("model.layers.0.mlp.down_proj",)


def test_rule_that_drops_a_tensor_keeps_the_modules_name():
    assert ModuleTable(["a.b"], [lambda name: None]).shards("a.b", {}) == ("a.b",)


def test_two_modules_with_one_name_are_refused():
    with pytest.raises(ValueError, match="a.x and b.x both to c.x"):
        ModuleTable(["a.x", "b.x"], [prefixes({"a.": "c.", "b.": "c."})])


def test_experts_of_a_mixture():
    modules = {
        (i, part): f"model.layers.0.mlp.experts.{i}.{part}" for i in (0, 11) for part in ("up_proj", "down_proj")
    }
    others = ["model.layers.0.mlp.experts_norm", "model.layers.0.mlp.experts.shared.up_proj"]
    table = ModuleTable([*modules.values(), *others], [QWEN2_VL])
    assert table.experts("language_model.model.layers.0.mlp.experts") == modules
    assert table.experts("language_model.model.layers.1.mlp.experts") == {}


def test_names_needs_neither_vllm_nor_torch():
    program = "import sys, vlmq_vllm.names; print(sorted({'vllm', 'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
