"""Checkpoints with inputs of 8 bits in transformers and in the commands: rounded, refused or shown, never forgotten."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from family_models import build
from family_samples import asked_of
from rounded_models import quantize_rounded, round_inputs, say_bits
from vlmq_vllm.errors import CheckpointError, RefusedError
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.checkpoint.export.export import TARGETS, export
from vlmq_vllm.offline.checkpoint.info import info
from vlmq_vllm.offline.checkpoint.verify import verify
from vlmq_vllm.offline.checkpoint.writer import SUMS, sha256
from vlmq_vllm.offline.commands.app import app


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def written(request, tmp_path_factory):
    """(folder with rounded inputs, its packed linears by name in memory, the same weights in 16 bits)."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder / "model")
    names = quantize_rounded(folder / "model", folder / "packed")
    say_bits(folder / "packed", 16)
    dequantize(folder / "packed", folder / "twin")
    say_bits(folder / "packed", 8)
    return folder / "packed", list(names), folder / "twin"


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@torch.inference_mode()
def test_transformers_rounds_the_inputs_of_packed_linears(written):
    """To the bit as the twin with the definition in place of every packed linear, and not as the twin alone."""
    folder, names, twin_folder = written
    model, twin = load(folder), load(twin_folder)
    asked = asked_of(folder).to(torch.bfloat16)
    logits, plain = model(**asked).logits, twin(**asked).logits
    round_inputs(twin, names)
    assert torch.equal(logits, twin(**asked).logits)
    assert not torch.equal(logits, plain)
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert sorted(hooked) == sorted(names)


def test_such_a_model_is_not_saved(written, tmp_path, caplog):
    with pytest.raises(ValueError, match="not serializable"):
        load(written[0]).save_pretrained(tmp_path / "saved")
    assert "rounded to 8 bits, which saved weights would not say; keep the vlmq folder" in caplog.text
    assert not (tmp_path / "saved").exists()


def test_experts_are_refused_by_transformers(tmp_path):
    build("qwen3_vl_moe", tmp_path / "model")
    quantize_rounded(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(CheckpointError, match="is no linear layer of transformers' model, and activation_bits is 8"):
        load(tmp_path / "packed")


def test_dequantize_is_refused(written, tmp_path):
    with pytest.raises(RefusedError, match="activation_bits is 8, .* would answer differently: .* from_pretrained"):
        dequantize(written[0], tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_export_is_refused(written, name, tmp_path):
    with pytest.raises(RefusedError, match=f"activation_bits is 8, and software for {name} rounds inputs in another"):
        export(written[0], tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bits", "shown", "said"),
    [(8, "8 bits (rounded token by token)", "at 8 bits, inputs at 8 bits"), (16, "16 bits", " at 8 bits")],
)
def test_info_and_verify_say_so(written, bits, shown, said, tmp_path):
    folder = shutil.copytree(written[0], tmp_path / "packed")
    say_bits(folder, bits)
    (folder / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())))
    assert info(folder).to_dict()["activation_bits"] == verify(folder).activation_bits == bits
    printed = ask("info", folder)
    assert (
        next(line for line in printed.splitlines() if line.split()[:1] == ["inputs"]).split(maxsplit=1)[1].strip()
        == shown
    )
    assert ask("verify", folder).rstrip().endswith(said)
    for command in ("info", "verify"):
        assert json.loads(ask(command, folder, "--json"))["activation_bits"] == bits


def ask(*arguments) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output
