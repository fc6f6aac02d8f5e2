"""vlmq plan: sizes by hand and against a written checkpoint, cuts against the plugin, what it says and refuses."""

import json
import sys

import pytest

import family_models
from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.commands import app
from vlmq_vllm.offline.plan.make import make_plan
from vlmq_vllm.offline.plan.tensor_parallel import fitting_groups, why_not_cut
from vlmq_vllm.offline.settings.quantize import Settings

KEYS = {
    "model",
    "model_type",
    "device",
    "settings",
    "parameters",
    "quantized_parameters",
    "bits_per_weight",
    "bits_per_parameter",
    "source_bytes",
    "checkpoint_bytes",
    "peak_is_bound",
    "peak_memory_bytes",
    "peak_device_bytes",
    "library_bytes",
    "tokens",
    "parts",
    "phases",
    "linears",
    "warnings",
}


def test_sizes_of_the_demo_model_by_hand(demo_model):
    found = make_plan(str(demo_model), Settings(), tokens=64)
    parts = {part.component: part for part in found.parts}
    # per layer q and o [256, 256], k and v [128, 256], gate, up and down of 256 x 768
    language = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
    assert parts["language"].parameters == parts["language"].quantized == found.quantized == language
    assert parts["embeddings"].parameters == parts["lm_head"].parameters == 512 * 256
    # two norms in each of 4 layers and the final one, 256 each, and the biases of q, k and v
    assert parts["norms and other"].parameters == 9 * 256 + 4 * (256 + 2 * 128)
    # merger: LayerNorm of 192, two linears of 768 x 768 and 256 x 768 with biases
    assert parts["connector"].parameters == 2 * 192 + 768 * 768 + 768 + 256 * 768 + 256
    # 3 bits, and a scale of 16 and a zero point of 3 bits in every group of 128
    assert found.bits_per_weight == 3 + 19 / 128
    rest = found.parameters - language
    assert found.source_bytes == 2 * found.parameters
    assert found.checkpoint_bytes == 2 * rest + language * (3 + 19 / 128) / 8


def test_the_checkpoint_has_the_predicted_size(demo_model, quantized):
    found = make_plan(str(demo_model), Settings(bits=3, group_size=64), tokens=64)
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    # the prediction leaves out weight_shape, two int64 for each of 7 linears in 4 layers
    assert index["metadata"]["total_size"] == found.checkpoint_bytes + 28 * 16


def test_json_has_stable_keys(demo_model, monkeypatch, capsys):
    arguments = ["plan", str(demo_model), "--bits", "2", "--group-size", "64", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", ["vlmq", *arguments])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert found["bits_per_weight"] == 2 + 18 / 64
    down = next(linear for linear in found["linears"] if linear["pattern"] == "model.layers.*.mlp.down_proj")
    assert (down["count"], down["rows"], down["columns"], down["groups"], down["last_group"]) == (4, 256, 768, 12, 64)
    assert down["vllm_layer"] == "RowParallelLinear"
    # 768 / 8 = 96 columns are one and a half groups of 64, which is served in groups of 32
    assert [down["tensor_parallel"][size]["fits"] for size in "1248"] == [True] * 4


def test_the_tables_name_what_json_has(demo_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vlmq", "plan", str(demo_model), "--device", "cpu", "--tokens", "64"])
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as end:
        app.main()
    assert not end.value.code
    text = capsys.readouterr().out
    for expected in ("3,145,728", "3.15", "7.4 MB, the source has 12.4 MB", "model.layers.*.mlp.down_proj"):
        assert expected in text


def test_an_unknown_family_exits_with_3_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "vision_config": {}}))
    monkeypatch.setattr(sys, "argv", ["vlmq", "plan", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        app.main()
    error = capsys.readouterr().err
    assert end.value.code == 3
    assert error.count("\n") == 1 and "'unheard_of' is not supported" in error


def test_layers_that_vllm_does_not_take_are_refused_and_named(tmp_path):
    family_models.build("llava_onevision", tmp_path)  # its SigLIP tower's inner size is 176
    with pytest.raises(RefusedError, match="mlp.fc1 .176, 64. cannot be served at 4 bits"):
        make_plan(str(tmp_path), Settings(vision_bits=4, group_size=32))
    forced = make_plan(str(tmp_path), Settings(vision_bits=4, group_size=32, force=True))
    refused = {linear.pattern.rpartition(".")[2] for linear in forced.linears if linear.refused}
    assert refused == {"fc1", "fc2"}
    assert sum("vLLM will not load" in line for line in forced.warnings) == 2


@pytest.mark.parametrize(("device", "tokens"), [("tpu", None), ("cpu", 0), ("cpu", 2049)])
def test_wrong_options_are_named(demo_model, device, tokens):
    with pytest.raises(QuantizeError, match=device if tokens is None else f"tokens is {tokens}"):
        make_plan(str(demo_model), Settings(), device, tokens)


# Qwen2-VL-72B's down_proj has 29568 = 2^7 x 3 x 7 x 11 columns: parts of 14784, 7392 and 3696, 16 times 231
@pytest.mark.parametrize(
    ("size", "bits", "group", "fitting"),
    [
        (2, 3, 128, [128, 64, 32, -1]),
        (4, 3, 128, [128, 64, 32, -1]),
        (8, 3, 128, []),  # 3696 columns of 3 bits do not end on a word
        (8, 4, 128, [-1]),  # groups of 16 would be too fine
        (8, 4, -1, [-1]),
    ],
)
def test_cuts_of_a_row_parallel_layer(size, bits, group, fitting):
    format = WeightFormat(bits, group, False)
    refused = why_not_cut("down_proj", 8192, 29568, format, size, None)
    assert (refused is None) == (group in fitting)
    assert refused is None or f"groups of {group} cannot be cut into {29568 // size} columns" in refused
    assert fitting_groups(29568, format, size) == fitting


@pytest.mark.parametrize(
    ("leaf", "heads", "size", "fits"),
    [
        ("q_proj", (28, 4), 4, True),
        ("q_proj", (28, 4), 8, False),
        ("k_proj", (64, 4), 8, True),  # two ranks share a head
        ("v_proj", (64, 8), 4, True),
        ("k_proj", (12, 3), 2, False),
        ("gate_proj", (64, 8), 8, True),
    ],
)
def test_cuts_of_column_parallel_layers(leaf, heads, size, fits):
    assert (why_not_cut(leaf, 3584, 3584, WeightFormat(3, 128, False), size, heads) is None) is fits


def test_warnings_name_the_group_size_that_fits_all(tmp_path):
    family_models.build("qwen2_vl", tmp_path)
    lines = make_plan(str(tmp_path), Settings(bits=4, samples=4), "cpu", tokens=64).warnings
    # down_proj has 208 columns: 104 for each of 2 ranks are groups of 8, 52 for each of 4 end within a word
    assert any("over 2" in line and line.endswith("--group-size -1 fits") for line in lines)
    assert any("over 4" in line and line.endswith("cannot be cut into 52 columns for each rank") for line in lines)


@pytest.mark.parametrize(
    ("family", "advice"),
    [
        ("qwen2_vl", "serve with --mm-encoder-tp-mode data, where every rank has the whole tower"),
        ("llava", "use fewer ranks"),
    ],
)
def test_warnings_name_the_sizes_that_the_towers_heads_do_not_divide_by(family, advice, tmp_path):
    family_models.build(family, tmp_path)  # with two heads
    lines = make_plan(str(tmp_path), Settings(bits=4, samples=4), "cpu", tokens=64).warnings
    assert f"tensor parallelism over 4 or 8: the tower's 2 heads do not divide; {advice}" in lines
    config = json.loads((tmp_path / "config.json").read_text())
    vision = config["vision_config"]
    vision["num_heads" if "num_heads" in vision else "num_attention_heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = make_plan(str(tmp_path), Settings(bits=4, samples=4), "cpu", tokens=64).warnings
    assert not any("heads" in line and "tower" in line for line in lines)


def test_experts_are_not_warned_about(tmp_path):
    family_models.build("qwen3_vl_moe", tmp_path)
    found = make_plan(str(tmp_path), Settings(bits=4, group_size=32, samples=128), "cpu", tokens=512)
    assert any(linear.layer == "FusedMoE" for linear in found.linears)
    # the widest expert has 128 columns: a third of 65,536 tokens is enough, and one process can serve it
    assert [line for line in found.warnings if not line.startswith("tensor parallelism over ")] == []
    # inputs of experts are not rounded while they are served
    with pytest.raises(RefusedError, match="inputs of experts are served at 16 bits only"):
        make_plan(str(tmp_path), Settings(bits=4, group_size=32, activation_bits=8))


def test_warnings_about_heads_and_tokens(demo_model):
    lines = make_plan(str(demo_model), Settings(samples=4), tokens=64).warnings
    assert any("over 8" in line and "4 attention heads do not divide by 8" in line for line in lines)
    assert any("at most 256 calibration tokens for weights of 768 columns; 4608" in line for line in lines)
    assert not any(
        "calibration tokens" in line for line in make_plan(str(demo_model), Settings(samples=72), tokens=64).warnings
    )


def test_few_effective_tokens_are_named_where_tokens_are_weighted(demo_model):
    def lines(**options):
        return make_plan(str(demo_model), Settings(samples=30, **options), tokens=64).warnings

    few = "token weights leave the decoder about 768 effective tokens for weights of 256 columns; 1536 or more"
    assert any(few in line for line in lines())
    assert any("768 effective tokens for weights of 768 columns; 4608" in line for line in lines(saliency_scope="all"))
    assert not any("effective" in line for line in lines(method="gptq"))
    assert not any("effective" in line for line in make_plan(str(demo_model), Settings(samples=72), tokens=64).warnings)


def test_few_tokens_are_named_where_columns_compensate(demo_model):
    def lines(method):
        return make_plan(str(demo_model), Settings(bits=4, method=method, samples=4), tokens=64).warnings

    assert any("calibration tokens" in line for line in lines("gptq"))
    assert not any("calibration tokens" in line for method in ("awq", "qvlm") for line in lines(method))
