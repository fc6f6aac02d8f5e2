"""Two processes at one quantisation, started by torchrun as users start them."""

import json
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.format import unpack
from vlmq_vllm.offline.verify import verify


def codes(folder):
    modules = read_modules(folder)
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    return {m: unpack(tensors[f"{m}.weight_packed"], 3, info.columns) for m, info in modules.items()}


def losses(folder):
    rows = json.loads((folder / "vlmq_report.json").read_text())["modules"]
    return {row["module"]: row["loss"] for row in rows}


def test_two_processes_write_what_one_writes(quantized, demo_model, calibration, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "vlmq_vllm.offline", "quantize", demo_model, "-o", tmp_path / "out", "--data", calibration]
    done = subprocess.run(
        [*map(str, command), "--bits", "3", "--group-size", "64"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("linears quantised") == 1  # only one process speaks
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(tmp_path / "out")
    one, two = codes(quantized), codes(tmp_path / "out")
    assert one.keys() == two.keys()
    # Sums over samples in another order differ by float32 rounding. In the first layer the attention's linears still
    # take the same codes but where a value lies between two; with one rank's residual left out 26 % of o_proj's differ.
    # A code that tips over is made good by the columns behind it and moves all that follows, so that further on only
    # the quality is the same: losses differed by up to 6 % for a linear (450 tokens for 768 columns know them poorly),
    # their sum by 0.3 %.
    first = [float((one[m] == two[m]).float().mean()) for m in one if re.search(r"layers\.0\.self_attn", m)]
    assert len(first) == 4 and min(first) > 0.995
    ours, theirs = losses(quantized), losses(tmp_path / "out")
    assert sum(theirs.values()) == pytest.approx(sum(ours.values()), rel=0.02)
    assert theirs == pytest.approx(ours, rel=0.2)
