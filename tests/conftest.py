"""What every test gets: Triton's interpreter where there is no GPU, a device, a seed."""

import json
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported, so before any of them

import pytest


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test whichever others run."""
    torch.manual_seed(0)


@pytest.fixture
def vlmq(monkeypatch, capsys):
    """Run `vlmq ARGS` in this process: (exit code, standard output, lines of standard error)."""
    from vlmq_vllm.offline.commands import app

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["vlmq", *map(str, args)])
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained demo model in bfloat16."""
    return Path(__file__).parent.parent / "examples/demo_vlm/model"


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> Path:
    """A JSONL file of eight chats with drawn pictures."""
    from data import write

    return write(tmp_path_factory.mktemp("calibration"), "calibration", 8)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory, demo_model, calibration) -> Path:
    """The demo model at 3 bits by VLMQ. Tests must not change it: copy it first."""
    from vlmq_vllm.offline.run.quantize import quantize
    from vlmq_vllm.offline.settings.quantize import Settings

    out = tmp_path_factory.mktemp("quantized") / "w3"
    quantize(str(demo_model), out, calibration, Settings(bits=3, group_size=64))
    return out


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory) -> Path:
    """A JSONL file of six chats: five with drawn pictures and their tasks, of which the demo model answers the last
    wrongly at 2 bits, and one without a picture."""
    from data import write
    from pictures import ask

    first, last = 12, 17
    path = write(tmp_path_factory.mktemp("evaluation"), "evaluation", last)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    drawn = [(i, line) for i, line in enumerate(lines)][first:]
    chats = [line | {"task": ask("evaluation", i)[1].task} for i, line in drawn]
    asked = [{"role": "user", "content": "What colour is it?"}, {"role": "assistant", "content": "red"}]
    path.write_text("\n".join(json.dumps(chat) for chat in [*chats, {"messages": asked}]))
    return path


@pytest.fixture(scope="session")
def rounded(tmp_path_factory, demo_model) -> dict[int, Path]:
    """The demo model rounded to nearest, by bits. Tests must not change it: copy it first."""
    from vlmq_vllm.offline.run.quantize import quantize
    from vlmq_vllm.offline.settings.quantize import Settings

    folder = tmp_path_factory.mktemp("rounded")
    for bits in (2, 4):
        quantize(str(demo_model), folder / str(bits), None, Settings(bits=bits, group_size=64, method="rtn"))
    return {bits: folder / str(bits) for bits in (2, 4)}
