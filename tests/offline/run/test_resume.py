"""Runs that end early, in processes of their own: nothing looks finished, nothing finished is lost, and what a resumed
run writes is what an uninterrupted one writes, byte for byte."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

SETTINGS = ("--bits", "3", "--group-size", "64")
# The command, which sends itself a signal when it gives the N-th finished file its name: that is what finishes a unit,
# so that "before" has a whole file that does not count yet.
SIGNALLED = """
import os, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
number, send, when = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
replace, seen = pathlib.Path.replace, []
def signalled(path, target):
    seen.append(path)
    if when == "before" and len(seen) == number:
        os.kill(os.getpid(), send)
    replace(path, target)
    if when == "after" and len(seen) == number:
        os.kill(os.getpid(), send)
pathlib.Path.replace = signalled
from vlmq_vllm.offline.commands.app import main
main()
"""


@pytest.fixture
def arguments(demo_model, calibration, tmp_path) -> list:
    """Of `vlmq`: the demo model into tmp_path/out."""
    return ["quantize", demo_model, "-o", tmp_path / "out", "--data", calibration, *SETTINGS]


@pytest.fixture
def begin(arguments):
    """Start `vlmq quantize` in a process of its own; `at`: unit, signal, "before" or "after" its rename."""

    def start(at: tuple = (), **how) -> subprocess.Popen:
        program = ["-c", SIGNALLED, *map(str, at)] if at else ["-m", "vlmq_vllm.offline"]
        command = [sys.executable, *program, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)

    return start


@pytest.fixture
def again(vlmq, arguments):
    """Run the same command in this process, which has all modules: (exit code, what it says of errors)."""

    def run(*options) -> tuple[int, str]:
        code, _, lines = vlmq(*arguments, *options)
        return code, "\n".join(lines)

    return run


def finished(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def sums(folder) -> str:
    return (folder / "SHA256SUMS").read_text()


# before the second layer, with a third layer that has been written but not named, and after the last layer
@pytest.mark.parametrize(
    ("unit", "when"),
    [
        pytest.param(1, "after", marks=pytest.mark.slow),
        (3, "before"),
        pytest.param(4, "after", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_resumed_to_the_same_bytes(unit, when, begin, again, quantized, tmp_path):
    assert finished(begin(at=(unit, signal.SIGKILL.value, when)))[0] == -signal.SIGKILL
    files = list((tmp_path / ".out.partial").glob("*.safetensors"))
    assert len(files) == (unit if when == "after" else unit - 1) and not (tmp_path / "out").exists()
    code, errors = again("--resume")
    assert code == 0, errors
    assert sums(tmp_path / "out") == sums(quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_must_be_decided_about(begin, again, tmp_path):
    finished(begin(at=(1, signal.SIGKILL.value, "after")))
    code, errors = again()
    assert code == 3 and "has an unfinished run (1 of 5 parts); add --resume" in errors, errors
    code, errors = again("--resume", "--seed", "7")
    assert code == 3 and "had" in errors and "remove" in errors, errors
    assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == 1


def test_sigterm_finishes_the_layer_and_exits_75(begin, again, quantized, tmp_path):
    code, errors = finished(begin(at=(1, signal.SIGTERM.value, "before")))
    assert code == 75 and "add --resume" in errors and "Traceback" not in errors, errors
    (file,) = (tmp_path / ".out.partial").glob("*.safetensors")
    assert load_file(file)
    assert again("--resume")[0] == 0
    assert sums(tmp_path / "out") == sums(quantized)


def test_a_full_disk_says_so_and_is_resumed(begin, again, quantized, tmp_path):
    """The kernel refuses to let any file grow beyond 1 MB, which the rest of the model does."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    code, errors = finished(begin(preexec_fn=limit))
    assert code == 3 and "no space left while writing" in errors and "add --resume" in errors, errors
    assert "Traceback" not in errors
    assert again("--resume")[0] == 0
    assert sums(tmp_path / "out") == sums(quantized)


def test_two_runs_to_one_place_do_not_meet(begin, again):
    process = begin(at=(1, signal.SIGSTOP.value, "before"))
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    code, errors = again("--method", "rtn")
    assert code == 3 and "another process is writing" in errors, errors
    process.kill()
    process.communicate()


def test_a_run_that_ends_before_its_first_layer_leaves_nothing(begin, tmp_path):
    assert finished(begin(at=(1, signal.SIGINT.value, "before")))[0] != 0
    assert not list(tmp_path.iterdir())


def test_report_and_recipe_of_a_run(quantized):
    report = json.loads((quantized / "vlmq_report.json").read_text())
    assert len(report["calibration"]["fingerprints"]) == 8
    recipe = (quantized / "vlmq_recipe.yaml").read_text()
    assert "bits: 3" in recipe and "group_size: 64" in recipe
    assert not os.path.exists(quantized / ".progress")
