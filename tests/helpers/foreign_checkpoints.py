"""The committed checkpoints: how one becomes small enough to commit, and a complete folder again.

`checkpoints/base` holds what all of them share: tokenizer, processor, and every tensor of the unquantised model that
is no decoder linear's (shared.safetensors). Every other folder is what its peer wrote beyond that: config.json and
other settings untouched, and own.safetensors. expected.safetensors is the truth (README.md).
"""

import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmq_vllm.foreign import SPECS
from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.headers import Tensors, read_config, read_headers

CHECKPOINTS = Path(__file__).resolve().parents[1] / "foreign/checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.glob("*-*"))
REFUSED = ("gptq-desc-act", "packed-actorder")  # columns out of order: no weights are expected of them
KEPT = ("config.json", "quant*_config.json", "recipe.yaml", "expected.safetensors")  # of what a peer wrote


def restore(name: str, folder: Path) -> None:
    """Write the checkpoint `name` into the new `folder` as its peer wrote it; tokenizer and processor are base's."""
    source = CHECKPOINTS / name
    shutil.copytree(CHECKPOINTS / "base", folder, ignore=shutil.ignore_patterns("shared.safetensors"))
    for path in source.glob("*"):
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    own = load_file(source / "own.safetensors")
    shared = load_file(CHECKPOINTS / "base" / "shared.safetensors")
    tensors = own | {_named_like(own, key): tensor for key, tensor in shared.items()}
    save_file(tensors, folder / "model.safetensors", metadata=_metadata(source / "own.safetensors"))


def expected(name: str) -> dict[str, torch.Tensor]:
    """Weights [O, I] float32 by module, as the peer that wrote the checkpoint dequantises them."""
    return load_file(CHECKPOINTS / name / "expected.safetensors")


def share(built: Path) -> None:
    """Make `checkpoints/base` from the unquantised model."""
    folder = CHECKPOINTS / "base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = load_file(built / "model.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if "_proj." not in key}, folder / "shared.safetensors")


def shrink(written: Path, name: str) -> None:
    """Make `checkpoints/name` from what a peer wrote into the folder `written`.

    Raises ValueError if a tensor that should be base's is not, bit for bit.
    """
    (file,) = written.glob("model*.safetensors")
    own = load_file(file)
    for key, tensor in load_file(CHECKPOINTS / "base" / "shared.safetensors").items():
        other = own.pop(_named_like(own, key))
        if other.dtype != tensor.dtype or not torch.equal(other, tensor):
            raise ValueError(f"{name}: {key} is not that of checkpoints/base; make all checkpoints anew")
    folder = CHECKPOINTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (path for pattern in KEPT for path in written.glob(pattern)):
        if path.name != "expected.safetensors" or name not in REFUSED:
            shutil.copy(path, folder)
    save_file(own, folder / "own.safetensors", metadata=_metadata(file))


def _named_like(own: dict[str, torch.Tensor], key: str) -> str:
    """Base has the hub's names; some peers write those of transformers' modules."""
    if not any(name.startswith("model.language_model.") for name in own):
        return key
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", key))


def _metadata(file: Path) -> dict[str, str] | None:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def read(folder: Path):
    config = read_config(folder)["quantization_config"]
    return SPECS[config["quant_method"]].from_dict(config).read(folder, read_headers(folder))


def weight_of(folder: Path, module: str, packing, info) -> QuantizedWeight:
    """A module's weight through its packing, tensor by tensor as a server gets them."""
    shape = (info.rows, info.columns)
    parts = {"weight_shape": torch.tensor(shape)}
    tensors = Tensors(folder, read_headers(folder))
    for name, expected_shape in packing.shapes(module, info.format, *shape).items():
        tensor = tensors.get(f"{module}.{name}")
        assert tensor.shape == expected_shape
        part = packing.unpack(module, name, tensor, info.format, shape)
        if part is not None:
            parts[packing.parts[name]] = part
    return QuantizedWeight.from_tensors(info.format, parts)
