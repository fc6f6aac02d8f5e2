"""Single small tensors of a folder of safetensors files, read while its headers are checked."""

from pathlib import Path

import torch
from safetensors import safe_open

from vlmq_vllm.checkpoint import TensorInfo


class Tensors:
    """Single tensors of a folder; files stay open within `with`."""

    def __init__(self, folder: Path, headers: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.headers = headers
        self.files = {}

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_) -> None:
        self.files.clear()

    def get(self, name: str) -> torch.Tensor:
        file = self.headers[name].file
        if file not in self.files:
            self.files[file] = safe_open(self.folder / file, "pt")
        return self.files[file].get_tensor(name)
