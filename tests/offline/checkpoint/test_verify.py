"""Damage on purpose: whatever happens to a checkpoint on disk is refused with the name of what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.offline.checkpoint.verify import verify
from vlmq_vllm.offline.checkpoint.writer import sha256

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def damaged(quantized, tmp_path):
    """A copy of the quantised demo model that a test may break."""
    return shutil.copytree(quantized, tmp_path / "model")


def sign(folder) -> None:
    """Make SHA256SUMS true again, so that only the contents are wrong."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(folder / n)}  {n}\n" for n in names))


def change_tensors(folder, change) -> None:
    path = folder / "model-00001-of-00005.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {name: file for name, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = others | dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sign(folder)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    sign(folder)


def test_a_sound_checkpoint(quantized):
    verdict = verify(quantized)
    assert len(verdict.modules) == 28
    assert verdict.bytes == sum(p.stat().st_size for p in quantized.iterdir() if p.name != "SHA256SUMS")


def test_one_flipped_bit_anywhere(damaged):
    for path in sorted(damaged.iterdir()):
        sound = path.read_bytes()
        for place in (0, len(sound) // 3, len(sound) // 2, len(sound) - 1):
            for bit in (0, 7):
                broken = bytearray(sound)
                broken[place] ^= 1 << bit
                path.write_bytes(broken)
                with pytest.raises(CheckpointError):
                    verify(damaged)
        path.write_bytes(sound)
    verify(damaged)


def test_files_that_the_hashes_do_not_cover(damaged):
    lines = (damaged / "SHA256SUMS").read_text().splitlines(keepends=True)
    (damaged / "SHA256SUMS").write_text("".join(line for line in lines if "config.json" not in line))
    with pytest.raises(CheckpointError, match="config.json is not in SHA256SUMS"):
        verify(damaged)


def test_a_module_that_is_gone_but_for_the_index(damaged):
    """The file and its hash are right, the index still names what the file should hold."""
    path = damaged / "model-00001-of-00005.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith(MODULE)}
    save_file(tensors, path, metadata={"format": "pt"})
    sign(damaged)
    with pytest.raises(CheckpointError, match=f"{MODULE}.weight_packed is in no file, but .* says model-00001"):
        verify(damaged)


def test_cut_and_missing_files(damaged):
    path = damaged / "model-00002-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="00002-of-00005.safetensors is damaged"):
        verify(damaged)
    path.unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00005.safetensors"):
        verify(damaged)


def set_item(tensors, name, value):
    tensors[f"{MODULE}.{name}"] = value


TENSORS = {
    "missing": (lambda t: t.pop(f"{MODULE}.weight_scale"), "weight_scale is missing"),
    "missing zero points": (lambda t: t.pop(f"{MODULE}.weight_zero_point"), "config.json says asymmetric"),
    "packed too narrow": (
        lambda t: set_item(t, "weight_packed", t[f"{MODULE}.weight_packed"][:, :-1].contiguous()),
        r"weight_packed has shape \[768, 23\], but 3 bits with groups of 64 and weight 768 x 256 need \[768, 24\]",
    ),
    "scale of wrong type": (
        lambda t: set_item(t, "weight_scale", t[f"{MODULE}.weight_scale"].to(torch.int32)),
        "weight_scale is I32, it must be F16 or BF16 or F32",
    ),
    "shape of nonsense": (
        lambda t: set_item(t, "weight_shape", torch.tensor([768, -256])),
        "weight_shape says 768 x -256, which is no weight",
    ),
    "a scale that is not finite": (
        lambda t: t[f"{MODULE}.weight_scale"].__setitem__((5, 1), float("nan")),
        "weight_scale holds NaN or infinity",
    ),
    "a weight in both forms": (
        lambda t: set_item(t, "weight", torch.zeros(768, 256)),
        "weight is one too many",
    ),
    "a scale of zero": (
        lambda t: t[f"{MODULE}.weight_scale"].__setitem__((5, 1), 0),
        "weight_scale holds a scale that is not positive",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_wrong_tensors_behind_right_hashes(change, message, damaged):
    change_tensors(damaged, change)
    with pytest.raises(CheckpointError, match=f"{MODULE}[. ].*{message}"):
        verify(damaged)


CONFIGS = {
    "other width": ({"bits": 4}, r"weight_packed has shape .* but 4 bits"),
    "other groups": ({"group_size": 32}, r"weight_scale has shape .* groups of 32"),
    "symmetric": ({"symmetric": True}, "config.json says symmetric"),
    "newer format": ({"format_version": 3}, "format_version is 3, this vlmq-vllm reads 1 and 2"),
    "other method": ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    "bits 5": ({"bits": 5}, "bits is 5; vlmq has 2, 3, 4, 8"),
    "override without module": (
        {"overrides": {"lm_head": {"bits": 4, "group_size": 64, "symmetric": True}}},
        "config.json says how lm_head is quantised, but it owns no weight_packed",
    ),
    "override without bits": ({"overrides": {MODULE: {"group_size": 64}}}, f"({MODULE}) lacks 'bits'"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_contradict_the_tensors(changes, message, damaged):
    change_config(damaged, **changes)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_modules(damaged)


def test_a_16_bit_model_is_no_checkpoint_of_ours(demo_model):
    with pytest.raises(CheckpointError, match="is not quantised"):
        verify(demo_model)
