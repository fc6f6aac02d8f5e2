"""Writes files that are there whole or not at all: aside, to disk, then renamed; and recognises a full disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from vlmq_vllm.errors import RefusedError

ASIDE = ".partial"  # after the name of a file that is being written
SPACE = (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """`with aside(path) as partial:` write `partial`, which then takes the place of `path`; an error leaves that."""
    partial = path.with_name(path.name + ASIDE)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_written(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises RefusedError unless the safetensors file holds these contiguous tensors bit by bit."""
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise RefusedError(f"{name} reads back from {path.parent} with other bits: the disk fails")


def is_about_space(error: Exception) -> bool:
    """Whether the disk, a quota or a limit of files' sizes is the reason, from Python or in safetensors' message."""
    if isinstance(error, OSError):
        return error.errno in SPACE
    return any(f"os error {number}" in str(error) or f"code: {number}" in str(error) for number in SPACE)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes, so that NaNs compare."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)  # of a single element any stride counts
