"""Runs that end early, in processes of their own: nothing looks finished, nothing finished is lost, and what a resumed
run writes is what an uninterrupted one writes, byte for byte."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

SETTINGS = ("--bits", "3", "--group-size", "64")


@pytest.fixture
def begin(demo_model, calibration, tmp_path):
    """Start `vlmq quantize` of the demo model into tmp_path/out."""

    def start(*options, **how) -> subprocess.Popen:
        command = [sys.executable, "-B", "-m", "vlmq_vllm.offline", "quantize", demo_model, "-o", tmp_path / "out"]
        command += ["--data", calibration, *SETTINGS, *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)

    return start


def finished(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_for(pattern: str, folder, process: subprocess.Popen) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def sums(folder) -> str:
    return (folder / "SHA256SUMS").read_text()


# the last is a kill after all layers, while or before the other tensors are written
@pytest.mark.parametrize("unit", [1, 3, 4])
def test_a_killed_run_is_resumed_to_the_same_bytes(unit, begin, quantized, tmp_path):
    process = begin()
    wait_for(f".out.partial/model-{unit:05d}-of-*.safetensors", tmp_path, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    code, errors = finished(begin())
    assert code == 3 and f"has an unfinished run ({unit} of 5 parts); add --resume" in errors, errors
    code, errors = finished(begin("--resume"))
    assert code == 0, errors
    assert sums(tmp_path / "out") == sums(quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigterm_finishes_the_layer_and_exits_75(begin, quantized, tmp_path):
    process = begin()
    wait_for(".out.partial/model-00001-of-*.safetensors", tmp_path, process)
    process.send_signal(signal.SIGTERM)
    code, errors = finished(process)
    assert code == 75 and "add --resume" in errors and "Traceback" not in errors, errors
    files = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
    assert 1 <= len(files) < 5 and all(load_file(file) for file in files)
    assert finished(begin("--resume"))[0] == 0
    assert sums(tmp_path / "out") == sums(quantized)


def test_a_full_disk_says_so_and_is_resumed(begin, quantized, tmp_path):
    """The kernel refuses to let any file grow beyond 1 MB, which the rest of the model does."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    code, errors = finished(begin(preexec_fn=limit))
    assert code == 3 and "no space left while writing" in errors and "add --resume" in errors, errors
    assert "Traceback" not in errors
    assert finished(begin("--resume"))[0] == 0
    assert sums(tmp_path / "out") == sums(quantized)


def test_another_run_cannot_be_resumed(begin, tmp_path):
    process = begin()
    wait_for(".out.partial/model-00001-of-*.safetensors", tmp_path, process)
    process.kill()
    process.communicate()
    code, errors = finished(begin("--resume", "--seed", "7"))
    assert code == 3 and "had" in errors and "remove" in errors
    assert list((tmp_path / ".out.partial").glob("*.safetensors"))


def test_two_runs_to_one_place_do_not_meet(begin, tmp_path):
    process = begin()
    wait_for(".out.partial", tmp_path, process)
    code, errors = finished(begin("--method", "rtn"))
    assert code == 3 and "another process is writing" in errors, errors
    process.kill()
    process.communicate()


def test_a_run_that_ends_before_its_first_layer_leaves_nothing(begin, tmp_path):
    process = begin()
    wait_for(".out.partial", tmp_path, process)
    process.send_signal(signal.SIGINT)
    assert finished(process)[0] != 0
    left = list(tmp_path.glob(".out.partial/*.safetensors"))
    assert left or not list(tmp_path.iterdir())


def test_report_and_recipe_of_a_run(quantized):
    report = json.loads((quantized / "vlmq_report.json").read_text())
    assert len(report["calibration"]["fingerprints"]) == 8
    recipe = (quantized / "vlmq_recipe.yaml").read_text()
    assert "bits: 3" in recipe and "group_size: 64" in recipe
    assert not os.path.exists(quantized / ".progress")
