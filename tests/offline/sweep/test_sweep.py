"""The component study on the demo model: pieces and figures against checkpoints that are written, and going on."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import RefusedError, StoppedError
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.headers import read_headers
from vlmq_vllm.offline.compare.run import compare
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from
from vlmq_vllm.offline.settings.sweep import SOLVER, StudySettings
from vlmq_vllm.offline.sweep.run import sweep

COUNT, SAMPLES = 4, 2
KINDS = StudySettings(bits=(2, 3), methods=("rtn", "gptq"), by="kind", calibration_samples=SAMPLES)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    from data import write

    return write(tmp_path_factory.mktemp("held-out"), "evaluation", COUNT)


@pytest.fixture(scope="module")
def study(tmp_path_factory, demo_model, calibration, held_out):
    """Attention and feed-forward by two methods: the folder and what `sweep` returned."""
    out = tmp_path_factory.mktemp("study") / "kinds"
    return out, sweep(str(demo_model), held_out, calibration, out, KINDS)


def settings_of(method, bits):
    return Settings(bits=bits, method=method, samples=SAMPLES, **SOLVER)


def row_of(found, method, label):
    [row] = [row for row in found["rows"] if (row["method"], row["label"]) == (method, label)]
    return row


def piece(study, method, layer):
    return load_file(study[0] / f"pieces/{method}-3/language-{layer:05d}.safetensors")


def served(tensors, module, format):
    parts = {part: tensors[f"{module}.{part}"] for part in PARTS}
    return QuantizedWeight.from_tensors(format, parts).dequantize(torch.bfloat16)


@pytest.fixture(scope="module")
def written(tmp_path_factory, demo_model, calibration):
    """Checkpoints of the same settings, by method, at 3 bits."""
    folder = tmp_path_factory.mktemp("written")
    for method in ("rtn", "gptq"):
        quantize(str(demo_model), folder / method, calibration, settings_of(method, 3))
    return {method: folder / method for method in ("rtn", "gptq")}


def test_figures_equal_those_of_a_comparison_with_a_written_checkpoint(study, written, demo_model, held_out):
    """Rounding to nearest: the same weights come out. Bound: both run in float32, figures are of size 0.01 to 1."""
    report = compare(
        str(demo_model), written["rtn"], held_out, CompareSettings(dtype="float32", device="cpu", max_new_tokens=0)
    )
    [everything] = [row for row in report["splits"] if row["split"] == "all"]
    row = row_of(study[1], "rtn", "all 3")
    assert row["kl"] == pytest.approx(everything["kl"]["mean"], rel=1e-3) and row["kl"] > 1e-4
    assert row["nll"] == pytest.approx(everything["nll_student"]["mean"], abs=1e-5)
    assert row["exact"] == everything["exact_student"]["mean"]
    assert study[1]["full_precision"]["nll"] == pytest.approx(everything["nll_teacher"]["mean"], abs=1e-5)


def test_sizes_are_those_of_the_written_checkpoint(study, written):
    headers = read_headers(written["rtn"])
    modules = read_modules(written["rtn"])
    bits = sum(
        info.format.bits_per_weight(info.rows, info.columns) * info.rows * info.columns for info in modules.values()
    )
    weights = sum(info.rows * info.columns for info in modules.values())
    row = row_of(study[1], "rtn", "all 3")
    assert row["bits_per_weight"] == pytest.approx(bits / weights)
    total = json.loads((written["rtn"] / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    shapes = 128 * len(modules)  # weight_shape: two int64 each, which count neither here nor there
    kept = {name for name in headers if name.rpartition(".")[0] not in modules or name.endswith(".bias")}
    parameters = sum(torch.Size(headers[name].shape).numel() for name in kept) + weights
    assert row["bits_per_parameter"] == pytest.approx((8 * total - shapes) / parameters)


def test_pieces_equal_what_a_run_writes_where_nothing_is_quantised_before(study, written):
    """In the first layer q, k and v get the same inputs in a run of GPTQ: the same bytes."""
    tensors = {name: t for path in written["gptq"].glob("*.safetensors") for name, t in load_file(path).items()}
    found = piece(study, "gptq", 0)
    for part in PARTS:
        for linear in "qkv":
            name = f"model.layers.0.self_attn.{linear}_proj.{part}"
            assert torch.equal(found[name], tensors[name]), name


def test_scaled_pieces_are_what_the_folded_layer_amounts_to(demo_model, calibration, held_out, tmp_path):
    """AWQ's run divides the norm in front of q and k by s: its q is rounded from W s, the piece from there is Q / s.

    Both runs stop after the first layer. Bound: the piece is rounded to bfloat16, 2^-9 of each weight.
    """
    out, method = tmp_path / "study", replace(KINDS, bits=(4,), methods=("awq",))
    for run in (
        lambda stop: sweep(str(demo_model), held_out, calibration, out, method, stop=stop),
        lambda stop: quantize(str(demo_model), tmp_path / "awq", calibration, settings_of("awq", 4), stop=stop),
    ):
        after_one = iter([False])
        with pytest.raises(StoppedError):
            run(lambda left=after_one: next(left, True))
    [path] = (tmp_path / ".awq.partial").glob("model-*.safetensors")
    tensors, found = load_file(path), load_file(out / "pieces/awq-4/language-00000.safetensors")
    before = load_file(demo_model / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    scales = before[norm].float() / tensors[norm].float()
    assert scales.max() > 1.01 * scales.min()  # else the test shows nothing
    for linear in "qk":
        module = f"model.layers.0.self_attn.{linear}_proj"
        expected = served(tensors, module, settings_of("awq", 4).format).float() / scales
        torch.testing.assert_close(found[f"{module}.weight"].float(), expected, rtol=2**-8, atol=0)


def test_a_study_tells_methods_and_parts_apart(study):
    out, found = study
    assert found["parts"] == ["attention", "feed-forward"] and found["questions"] == COUNT
    for method in KINDS.methods:
        rises = found["rises"][method]
        for part in found["parts"]:
            for bits in (2, 3):
                assert rises[part][bits] == row_of(found, method, f"{part} {bits}, others 16")["kl"] > 0
        assert row_of(found, method, "all 2")["kl"] > row_of(found, method, "feed-forward 3, others 16")["kl"]
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert "## One part at a time, gptq" in report and "| attention | 25.0 |" in report
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 2 * 6 and float(rows[1]["kl"]) == found["rows"][0]["kl"]
    front = [(row["bits_per_weight"], row["kl"]) for row in found["pareto"]]
    assert front == sorted(front) and front[-1] == (16.0, 0.0)


def test_a_study_that_was_stopped_goes_on_and_ends_the_same(study, demo_model, calibration, held_out, tmp_path):
    """Stopped among the pieces, then among the configurations."""
    out, asked = tmp_path / "again", (str(demo_model), held_out, calibration)
    for patience in (2, 9):
        left = iter([False] * patience)
        with pytest.raises(StoppedError, match="add --resume"):
            sweep(*asked, out, KINDS, resume=True, stop=lambda left=left: next(left, True))
    assert 0 < len(json.loads((out / "study.json").read_text())["rows"]) < 12
    assert sweep(*asked, out, KINDS, resume=True)["rows"] == study[1]["rows"]
    for name in ("study.json", "results.csv", "pareto.csv", "report.md"):
        assert (out / name).read_bytes() == (study[0] / name).read_bytes(), name


def test_a_folder_goes_on_only_with_the_same_study(study, demo_model, calibration, held_out, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(study[0], out)
    asked = (str(demo_model), held_out, calibration, out)
    with pytest.raises(RefusedError, match="holds a study already; add --resume"):
        sweep(*asked, KINDS)
    with pytest.raises(RefusedError, match="had group_size 128, this run has 64; give the same"):
        sweep(*asked, replace(KINDS, group_size=64), resume=True)
    with pytest.raises(RefusedError, match="is no folder of a study"):
        sweep(str(demo_model), held_out, calibration, tmp_path, KINDS, resume=True)
    # other parts of the same linears are more rows of it; what has been run is not run again
    found = sweep(*asked, replace(KINDS, bits=(3,), methods=("rtn",), by="third"), resume=True)
    assert found["parts"] == ["front", "middle", "end"] and len(found["rows"]) == 12 + 3


def test_rounding_to_nearest_is_studied_without_calibration_and_gptq_added_later(
    study, demo_model, calibration, held_out, tmp_path
):
    out, settings = tmp_path / "study", replace(KINDS, bits=(3,), methods=("rtn",))
    sweep(str(demo_model), held_out, None, out, settings)
    found = sweep(str(demo_model), held_out, calibration, out, replace(settings, methods=("rtn", "gptq")), resume=True)
    expected = {(row["method"], row["label"]): row for row in study[1]["rows"] if "3" in row["label"]}
    assert {(row["method"], row["label"]): row for row in found["rows"]} == expected and len(expected) == 6
    assert f"calibrated with {calibration}" in (out / "report.md").read_text()
    with pytest.raises(RefusedError, match="has another calibration: give the same --calibration"):
        sweep(str(demo_model), held_out, None, out, settings, resume=True)


def test_a_budget_becomes_a_recipe_that_a_run_obeys(study, written, demo_model, calibration, held_out, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(study[0], out)
    settings = replace(KINDS, methods=("gptq",), budget=2.6)
    found = sweep(str(demo_model), held_out, calibration, out, settings, resume=True)
    mixture = found["mixture"]
    assert len(mixture["widths"]) == 4 * 4 and {2, 3} <= set(mixture["widths"].values()) <= {2, 3, 16}
    assert 2.4 < mixture["row"]["bits_per_weight"] <= 2.6
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    settings = settings_from(read_recipe(out / "recipe.yaml"), {"samples": SAMPLES})
    assert settings.method == "vlmq" and settings.base == "qep"  # as without a recipe
    quantize(str(demo_model), tmp_path / "mixed", calibration, settings)
    modules = read_modules(tmp_path / "mixed")
    bits = sum(
        info.format.bits_per_weight(info.rows, info.columns) * info.rows * info.columns for info in modules.values()
    )
    weights = sum(info.rows * info.columns for info in modules.values())
    every = sum(info.rows * info.columns for info in read_modules(written["rtn"]).values())
    assert (bits + 16 * (every - weights)) / every == pytest.approx(mixture["row"]["bits_per_weight"])
    fused = {"qkv": "q_proj", "gate_up": "up_proj"}
    for name, width in mixture["widths"].items():
        layer, parent, linear = name.split(".")
        info = modules.get(f"model.layers.{layer}.{parent}.{fused.get(linear, linear)}")
        assert (info.format.bits if info else 16) == width
    assert 0 < len(recipe["modules"]) < 28 and recipe.keys() == {"bits", "group_size", "symmetric", "modules"}


@pytest.mark.parametrize("budget", [1.0, 2.1])
def test_an_impossible_budget_is_refused_before_any_work(demo_model, held_out, calibration, tmp_path, budget):
    settings = replace(KINDS, budget=budget)
    with pytest.raises(RefusedError, match=r"with 2 bits and scales: give 2\.15 or more, "):
        sweep(str(demo_model), held_out, calibration, tmp_path / "study", settings)
    assert not list(tmp_path.iterdir())


def test_held_out_chats_are_no_calibration_chats(demo_model, held_out, tmp_path):
    with pytest.raises(
        RefusedError, match=f"{SAMPLES} of {SAMPLES} calibration chats are held out too, such as .* line "
    ):
        sweep(str(demo_model), held_out, held_out, tmp_path / "study", KINDS)


def test_a_picture_that_is_in_both_is_said(demo_model, calibration, tmp_path):
    line = json.loads(calibration.read_text().splitlines()[0])
    line["messages"][0]["content"][1]["text"] = "What is it?"
    other, said = calibration.parent / "other.jsonl", []
    other.write_text(json.dumps(line))
    with pytest.raises(StoppedError):
        sweep(str(demo_model), calibration, other, tmp_path / "s", KINDS, say=said.append, stop=lambda: True)
    assert any(line.startswith("warning: 1 of 1 calibration chats share a picture") for line in said)
