"""Studies of tiny models of several families: every component end to end, and pieces outside a dense decoder."""

import json

import pytest
import torch
from safetensors.torch import load_file

from family_studies import build_study, make_pieces
from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.offline.compare.run import compare
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.settings.sweep import SOLVER, StudySettings

COMPONENTS = {"vision": "visual.blocks.*", "connector": "visual.merger.*"}  # names in the files of Qwen2-VL


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return build_study("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return build_study("qwen3_vl_moe", tmp_path_factory.mktemp("qwen3_vl_moe"))


def tensors_of(folder, inside=""):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
        if inside in name
    }


def test_the_command_studies_every_component(vlmq, qwen, tmp_path):
    """The options' defaults, but for rows as groups (the tower's 64 columns make no group of 128). References are
    checkpoints in which one component is rounded. Bound: both run in float32, and KL is a mean of float32 figures."""
    out = tmp_path / "study"
    given = ("--data", qwen.held_out, "--calibration", qwen.calibration, "-o", out, "--group-size", -1)
    code, printed, said = vlmq("sweep", qwen.model, *given, "--device", "cpu", "--json")
    assert code == 0, said
    assert any("2 held-out questions, 1 with a picture; 3 parts by component" in line for line in said)
    found = json.loads(printed)
    assert found["parts"] == ["vision", "connector", "language"]
    rows = {(row["method"], row["label"]): row for row in found["rows"]}
    assert len(rows) == 2 * (3 + 3 * 3)
    for method in ("rtn", "gptq"):
        for part in found["parts"]:
            for bits in (2, 3, 4):
                assert found["rises"][method][part][str(bits)] == rows[method, f"{part} {bits}, others 16"]["kl"] > 0
    for component in COMPONENTS:
        write_alone(qwen, component, tmp_path / component, method="rtn")
        options = CompareSettings(dtype="float32", device="cpu", max_new_tokens=0)
        report = compare(str(qwen.model), tmp_path / component, qwen.held_out, options)
        [everything] = [row for row in report["splits"] if row["split"] == "all"]
        row = rows["rtn", f"{component} 3, others 16"]
        assert row["kl"] == pytest.approx(everything["kl"]["mean"], rel=1e-3)
    report = (out / "report.md").read_text()
    assert "24 configurations on 2 held-out questions" in report and "1 with a picture" in report
    assert "One group per row, asymmetric" in report and "over its 64 likeliest tokens" in report


@pytest.mark.parametrize("component", COMPONENTS)
def test_pieces_of_awq_outside_the_decoder_are_what_a_run_writes(qwen, tmp_path, component):
    """There a run of AWQ scales nothing, and every block gets what the full-precision ones before it give: the same
    weights come out, as those that codes and scales amount to."""
    settings = StudySettings(bits=(3,), methods=("awq", "rtn"), group_size=-1)
    make_pieces(qwen, settings, tmp_path / "pieces", (component,))
    write_alone(qwen, component, tmp_path / "out", method="awq", **SOLVER)
    found, plain = tensors_of(tmp_path / "pieces/awq-3"), tensors_of(tmp_path / "pieces/rtn-3")
    written, modules = tensors_of(tmp_path / "out"), read_modules(tmp_path / "out")
    assert {name.removesuffix(".weight") for name in found} == modules.keys()
    assert len(found) == {"vision": 3 * 4, "connector": 2}[component]
    for name, weight in found.items():
        module = name.removesuffix(".weight")
        assert torch.equal(weight, served(written, module, modules[module].format)), name
    clipped = [name for name in plain if name.endswith("scale") and not torch.equal(plain[name], written[name])]
    assert 2 * len(clipped) >= len(found)  # else the test shows nothing


def write_alone(given, component, out, **options):
    """A checkpoint in which one component has 3 bits."""
    settings = Settings(bits=4, group_size=-1, modules={"*": 16, COMPONENTS[component]: 3}, **options)
    quantize(str(given.model), out, given.calibration, settings)


def served(tensors, module, format):
    parts = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
    return QuantizedWeight.from_tensors(format, parts).dequantize(torch.bfloat16)


def test_pieces_of_experts_are_what_a_run_writes_where_nothing_is_quantised_before(experts, tmp_path):
    """One run quantises gate and up of the second layer's experts alone, another one down: their inputs are those of
    the full-precision model, as in a study. Each expert has its own tokens, so that any mix-up of experts shows."""
    settings = StudySettings(bits=(3,), methods=("gptq",), group_size=-1)
    make_pieces(experts, settings, tmp_path / "pieces", ("language",))
    found = load_file(tmp_path / "pieces/gptq-3/language-00001.safetensors")
    compared = 0
    for linears in ("[gu]*_proj", "down_proj"):
        modules = {"*": 16, f"*.layers.1.mlp.experts.*.{linears}": 3}
        options = Settings(bits=3, group_size=-1, method="gptq", **SOLVER, modules=modules)
        quantize(str(experts.model), tmp_path / linears[-8], experts.calibration, options)
        written = tensors_of(tmp_path / linears[-8], ".experts.")
        packed = {name for name in written if name.endswith("weight_packed")}
        for name in packed:
            for part in PARTS:
                key = name.replace("weight_packed", part)
                if key in written:
                    assert torch.equal(found[key], written[key]), key
            compared += 1
    assert compared == 6 * 3
