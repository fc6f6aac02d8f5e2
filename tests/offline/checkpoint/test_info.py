"""vlmq info on a written checkpoint, and vlmq doctor's judgements on machines that are made up."""

import json
import shutil
import sys

import pytest

from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.offline.checkpoint.info import component_of, info
from vlmq_vllm.offline.commands import app
from vlmq_vllm.offline.machine.doctor import (
    available_memory,
    device_problems,
    find_flags,
    find_packages,
    judge,
    probe_plugin,
)


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vlmq", *arguments])
    with pytest.raises(SystemExit) as end:
        app.main()
    return end.value.code or 0


def test_a_checkpoint_says_what_it_holds(quantized):
    found = info(quantized)
    language = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
    assert found.quantized == language
    # 3 bits, and a scale of 16 and a zero point of 3 bits in every group of 64
    assert found.bits_per_weight == 3 + 19 / 64
    assert [kind.count for kind in found.kinds] == [4] * 7
    assert {kind.pattern.rpartition(".")[2]: kind.parameters for kind in found.kinds} == {
        "q_proj": 4 * 256 * 256,
        "k_proj": 4 * 128 * 256,
        "v_proj": 4 * 128 * 256,
        "o_proj": 4 * 256 * 256,
        "gate_proj": 4 * 256 * 768,
        "up_proj": 4 * 256 * 768,
        "down_proj": 4 * 256 * 768,
    }
    assert found.samples == 8
    assert found.tool["settings"]["group_size"] == 64
    kept = found.parameters - language
    assert found.bits_per_parameter == (16 * kept + (3 + 19 / 64) * language) / found.parameters
    assert found.bytes == sum(path.stat().st_size for path in quantized.glob("*.safetensors"))


def test_info_as_json_and_as_table(quantized, monkeypatch, capsys):
    assert run(monkeypatch, "info", str(quantized), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model_type"] == "qwen2_vl" and found["samples"] == 8
    assert {(kind["bits"], kind["group_size"], kind["symmetric"], kind["count"]) for kind in found["formats"]} == {
        (3, 64, False, 4)
    }
    assert {kind["bits_per_weight"] for kind in found["formats"]} == {3 + 19 / 64}
    monkeypatch.setenv("COLUMNS", "400")
    assert run(monkeypatch, "info", str(quantized)) == 0
    text = capsys.readouterr().out
    assert "3.297 quantised" in text and f"vllm serve {quantized} --quantization vlmq" in text


def test_info_without_the_report_of_the_run(quantized, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    (copy / "vlmq_report.json").unlink()
    assert info(copy).samples is None
    (copy / "vlmq_report.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not the report of a vlmq run"):
        info(copy)


def test_info_of_a_model_that_is_not_quantised_exits_with_4(demo_model, monkeypatch, capsys):
    assert run(monkeypatch, "info", str(demo_model)) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not quantised" in error


@pytest.mark.parametrize(
    ("module", "component"),
    [
        ("visual.blocks.0.attn.qkv", "vision"),
        ("visual.merger.mlp.0", "connector"),
        ("multi_modal_projector.linear_1", "connector"),
        ("model.layers.3.mlp.down_proj", "language"),
        ("lm_head", "lm_head"),
    ],
)
def test_components_by_name(module, component):
    assert component_of(module) == component


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ("0.33.0+cpu", None),
        ("0.26.0", None),
        ("0.25.1", "vllm is 0.25.1, supported is >=0.26,<0.34; do it"),
        ("0.34.0", "vllm is 0.34.0, supported is >=0.26,<0.34; do it"),
        (None, "vllm is not installed; do it"),
    ],
)
def test_versions_are_judged(found, problem):
    assert judge("vllm", found, ">=0.26,<0.34", "do it").problem == problem


def test_ranges_are_those_of_the_distribution():
    supported = {package.name: package.supported for package in find_packages()}
    assert supported["python"] == ">=3.11"
    assert supported["torch"] == ">=2.9"
    assert supported["transformers"] == ">=5.5"


def test_old_devices_and_processors_are_problems():
    old = {"name": "Tesla T4", "capability": [7, 5], "memory": 16_000_000_000}
    new = {"name": "A100", "capability": [8, 0], "memory": 80_000_000_000}
    assert device_problems([new], []) == []
    (line,) = device_problems([new, old], ["avx2"])
    assert line.startswith("Tesla T4 has compute capability 7.5, the plugin needs 8.0")


def test_a_processor_without_wide_vectors_is_a_problem(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert device_problems([], ["avx512f"]) == []
    assert len(device_problems([], [])) == 1


def test_flags_and_memory_as_linux_writes_them(tmp_path):
    processors, memory = tmp_path / "cpuinfo", tmp_path / "meminfo"
    processors.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f amx_tile\n\nprocessor\t: 1\nflags\t: fpu\n")
    memory.write_text("MemTotal:       24000000 kB\nMemAvailable:   1000 kB\n")
    assert find_flags(processors) == ["avx2", "avx512f", "amx_tile"]
    assert available_memory(memory) == 1_024_000
    assert find_flags(tmp_path / "none") == [] and available_memory(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("probe", "timeout", "works", "says"),
    [
        ("print('noise'); print('registered')", 60, True, None),
        ("print('missing')", 60, False, "could not register"),
        ("raise ImportError('libfoo.so is missing')", 60, False, "libfoo.so is missing"),
        ("import time; time.sleep(60)", 0.5, False, "within 0.5 seconds"),
    ],
)
def test_the_probe_of_the_plugin(probe, timeout, works, says):
    found, trouble = probe_plugin(probe, timeout)
    assert found is works
    assert trouble is None if says is None else says in trouble


def test_doctor_ends_with_3_when_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("vlmq_vllm.offline.machine.doctor.VLLM", ">=99")
    monkeypatch.setattr("vlmq_vllm.offline.machine.doctor.probe_plugin", lambda: (True, None))
    assert run(monkeypatch, "doctor", "--json") == 3
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith("vllm is ") and problem.endswith('pip install "vllm>=99" for serving')
