"""The committed checkpoints: how one becomes small enough to commit, and a complete folder again.

`checkpoints/base` is the unquantised model. Every other folder holds what its peer wrote and base does not have:
config.json and other settings untouched, the tensors that differ as own.safetensors, and in same.json the tensors
that are those of base, bit for bit, by the peer's name and base's. expected.safetensors is the truth (README.md).
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHECKPOINTS = Path(__file__).with_name("checkpoints")
KEPT = ("config.json", "quant*_config.json", "recipe.yaml", "expected.safetensors")  # of what a peer wrote
NAMES = sorted(path.name for path in CHECKPOINTS.glob("*-*"))


def restore(name: str, folder: Path) -> None:
    """Write the checkpoint `name` into the new `folder` as its peer wrote it; tokenizer and processor are base's."""
    source = CHECKPOINTS / name
    shutil.copytree(CHECKPOINTS / "base", folder, ignore=shutil.ignore_patterns("model.safetensors"))
    for path in source.glob("*"):
        if path.name not in ("own.safetensors", "same.json", "expected.safetensors"):
            shutil.copy(path, folder)
    base = load_file(CHECKPOINTS / "base" / "model.safetensors")
    same = json.loads((source / "same.json").read_text())
    tensors = load_file(source / "own.safetensors") | {ours: base[theirs] for ours, theirs in same.items()}
    save_file(tensors, folder / "model.safetensors", metadata=_metadata(source / "own.safetensors"))


def expected(name: str) -> dict[str, torch.Tensor]:
    """Weights [O, I] float32 by module, as the peer that wrote the checkpoint dequantises them."""
    return load_file(CHECKPOINTS / name / "expected.safetensors")


def shrink(written: Path, name: str) -> None:
    """Make `checkpoints/name` from what a peer wrote into the folder `written`."""
    folder = CHECKPOINTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (path for pattern in KEPT for path in written.glob(pattern)):
        shutil.copy(path, folder)
    base = load_file(CHECKPOINTS / "base" / "model.safetensors")
    (file,) = written.glob("model*.safetensors")
    own, same = {}, {}
    for key, tensor in load_file(file).items():
        twins = (other for other, value in base.items() if value.dtype == tensor.dtype and torch.equal(value, tensor))
        if twin := next(twins, None):
            same[key] = twin
        else:
            own[key] = tensor
    save_file(own, folder / "own.safetensors", metadata=_metadata(file))
    (folder / "same.json").write_text(json.dumps(same, indent=0, sort_keys=True) + "\n")


def _metadata(file: Path) -> dict[str, str] | None:
    with safe_open(file, "pt") as opened:
        return opened.metadata()
