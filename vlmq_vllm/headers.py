"""Reads config.json and the safetensors headers of a model folder; a broken file is a CheckpointError that names it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vlmq_vllm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}  # of a value, by dtype; others have 1


@dataclass(frozen=True)
class TensorInfo:
    """Header of one tensor; `dtype` in safetensors' spelling, such as "BF16" or "I32"."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


def read_config(folder: Path) -> dict:
    """config.json of a model folder. Raises CheckpointError when the folder or file is missing or not JSON."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a model with config.json in it")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a model in Hugging Face's layout")
    return _read_json(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of the index, or model.safetensors alone."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_read_index(index).values()))
        paths = [folder / name for name in names]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index} points outside its folder ({outside[0]!r}); do not use this checkpoint")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise CheckpointError(f"{folder} lacks {missing[0] if missing else '*.safetensors'}; copy it again in full")
    return paths


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of tensors to files; copy it again from its source")
    return weight_map


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again from its source") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object; copy it again from its source")
    return content


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Header of every tensor of a model by name, without reading weights. Raises CheckpointError for a broken file."""
    headers: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, safe_open is not iterable
                    piece = file.get_slice(name)
                    info = TensorInfo(path.name, piece.get_dtype(), tuple(piece.get_shape()))
                    if name in headers:
                        raise CheckpointError(f"{name} is in {headers[name].file} and in {path.name}")
                    headers[name] = info
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again from its source") from None
    index, files = folder / INDEX, {name: info.file for name, info in headers.items()}
    listed = _read_index(index) if index.is_file() else files
    for name, _ in sorted(listed.items() ^ files.items()):
        found, said = files.get(name, "no file"), listed.get(name, "no file")
        raise CheckpointError(f"{name} is in {found}, but {index} says {said}; copy the checkpoint again")
    return headers


class Tensors:
    """Single tensors of a folder. Opening a file reads its whole header, so files stay open as long as this lives."""

    def __init__(self, folder: Path, headers: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.headers = headers
        self.files: dict[str, safe_open] = {}

    def get(self, name: str) -> torch.Tensor:
        file = self.headers[name].file
        if file not in self.files:
            self.files[file] = safe_open(self.folder / file, "pt")
        return self.files[file].get_tensor(name)
