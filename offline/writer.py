"""Writing a quantised checkpoint so that nothing unfinished ever looks finished, and nothing existing is lost.

Everything goes to a hidden folder `.NAME.partial-*` beside the destination. Every shard is read back and compared bit
by bit when it is written; SHA256SUMS is made last; then the folder is renamed. Any exception removes the hidden folder;
only a process killed outright leaves it, and the next run to the same destination removes it then.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmq_vllm.checkpoint import INDEX
from vlmq_vllm.errors import QuantizeError

SUMS = "SHA256SUMS"
REPORT = "vlmq_report.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
OWN = ("config.json", INDEX, SUMS, REPORT)


class Writer:
    """`with Writer(out, needed_bytes) as writer:` then `add` tensors and `finish` once."""

    def __init__(self, out: Path, needed: int) -> None:
        check_destination(out)
        self.out = out
        parent = out.absolute().parent
        for stale in parent.glob(f".{out.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise QuantizeError(f"{parent} has {_size(free)} free, the checkpoint needs {_size(needed)}; make room")
        self.folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=parent))
        self.shards: list[dict[str, int]] = []  # of each file: tensor name -> bytes

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # renamed away when finished
        if isinstance(error, OSError | SafetensorError) and _is_about_space(error):
            raise QuantizeError(f"no space left while writing {self.out}; make room and run again") from error

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write one shard and compare it with what was meant."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        path = self.folder / f"shard-{len(self.shards):05d}"
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files private
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                    raise QuantizeError(f"{name} reads back from {self.folder} with other bits: the disk is failing")
        self.shards.append({name: tensor.nbytes for name, tensor in tensors.items()})

    def finish(self, source: Path, config: dict, report: dict) -> None:
        """Add what belongs to the model beside its weights, then give the folder its name."""
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in WEIGHTS and path.name not in OWN and path.name[0] != ".":
                shutil.copyfile(path, self.folder / path.name)
        weight_map = {}
        for i, shard in enumerate(self.shards):
            name = f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"shard-{i:05d}").rename(self.folder / name)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(sum(shard.values()) for shard in self.shards)
        self._json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._json("config.json", config)
        self._json(REPORT, report)
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(self.folder.iterdir())]
        (self.folder / SUMS).write_text("".join(sums))
        self.folder.chmod(0o755)  # mkdtemp's is private
        self.folder.rename(self.out)

    def _json(self, name: str, content: dict) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")


def check_destination(out: Path) -> None:
    """Raises QuantizeError unless `out` can be created."""
    if os.path.lexists(out):
        raise QuantizeError(f"{out} exists already; remove it or choose another folder")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise QuantizeError(f"{parent} is not a folder; create it or choose another place for the output")
    if not os.access(parent, os.W_OK):
        raise QuantizeError(f"{parent} may not be written to; choose another place for the output")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes, so that NaNs compare."""
    return tensor.reshape(-1).view(torch.uint8)


def _is_about_space(error: Exception) -> bool:
    """ENOSPC, EFBIG or EDQUOT, from Python or inside safetensors' message."""
    if isinstance(error, OSError):
        return error.errno in (28, 27, 122)
    return any(f"os error {number}" in str(error) or f"code: {number}" in str(error) for number in (28, 27, 122))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
