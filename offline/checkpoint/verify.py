"""Verifies that a checkpoint on disk is whole and says the same in its hashes, config and tensors."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_vllm.checkpoint import ModuleInfo, read_modules, read_spec
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.headers import Tensors, read_headers
from vlmq_vllm.offline.checkpoint.writer import SUMS, sha256


@dataclass(frozen=True)
class Verdict:
    """What was found in a sound checkpoint; `bytes` counts every file, `activation_bits` are the linears' inputs'."""

    modules: dict[str, ModuleInfo]
    tensors: int
    files: int
    bytes: int
    activation_bits: int


def verify(folder: Path) -> Verdict:
    """Check hashes, schema and numbers. Raises CheckpointError that names the first file or tensor that is wrong."""
    modules = read_modules(folder)
    if not modules:
        raise CheckpointError(f"{folder} calls itself vlmq, but no tensor is quantised; quantise it anew")
    files = _check_sums(folder)
    headers = read_headers(folder)
    tensors = Tensors(folder, headers)
    for name in headers:
        tensor = tensors.get(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity; quantise again")
        if name.endswith(".weight_scale") and not (tensor > 0).all():
            raise CheckpointError(f"{name} holds a scale that is not positive; quantise again")
    size = sum(path.stat().st_size for path in files)
    return Verdict(modules, len(headers), len(files), size, read_spec(folder).activation_bits)


def _check_sums(folder: Path) -> list[Path]:
    path = folder / SUMS
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {SUMS}; it was not written by vlmq or not copied in full")
    listed = {}
    for line in path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        if not name or Path(name).name != name:
            raise CheckpointError(f"{path} has the line {line!r}, which names no file beside it")
        listed[folder / name] = digest
    for file, digest in listed.items():
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; copy the checkpoint again in full")
        if sha256(file) != digest:
            raise CheckpointError(f"{file} has changed since it was written (SHA-256 differs); copy it again")
    surplus = sorted(p.name for p in folder.iterdir() if p.is_file() and p not in {path, *listed})
    if surplus:
        raise CheckpointError(f"{folder / surplus[0]} is not in {SUMS}; remove it or copy the checkpoint again")
    return list(listed)
