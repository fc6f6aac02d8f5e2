"""Keeps the teacher's scores on disk, so that several students are compared with one run of the 16-bit model.

A file is named by the hash of everything that its numbers depend on: model files, chats, settings, versions. Other
model, data or settings have another name, so nothing stale is ever read; what it is that differs is said.
"""

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.headers import weight_files
from vlmq_vllm.offline.compare.scores import Score, load, save
from vlmq_vllm.offline.settings.compare import CompareSettings

LAYOUT = 1  # of the files; counts up when their meaning changes
SMALL = (".json", ".jinja", ".txt", ".model")


def key_of(model: Path, chats: list[str], ends: set[int], settings: CompareSettings, device: str) -> dict[str, str]:
    """What the teacher's numbers depend on, by name; `chats` are fingerprints in order."""
    packages = ("torch", "transformers", *(("vllm",) if settings.backend == "vllm" else ()))
    return {
        "layout": str(LAYOUT),
        "model files": fingerprint_of(model),
        "data": hashlib.sha256("\n".join(chats).encode()).hexdigest(),
        "settings": f"{settings.backend} {settings.dtype} {device} {settings.top} {settings.max_new_tokens} "
        f"{settings.max_tokens} {sorted(ends)}",
        "versions": " ".join(f"{name} {_version(name)}" for name in packages),
    }


def fingerprint_of(model: Path) -> str:
    """SHA-256 of a folder's small files and of every weight file's name, size and time of change: reading weights
    through takes as long as running the teacher."""
    digest, weights = hashlib.sha256(), set(weight_files(model))
    for path in sorted(weights.union(path for path in model.iterdir() if path.suffix in SMALL and path.is_file())):
        stat = path.stat()
        content = f"{stat.st_size} {stat.st_mtime_ns}".encode() if path in weights else path.read_bytes()
        digest.update(f"{path.name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


class Cache:
    """`folder` of teachers' scores; `say` is told in one line why a file cannot be used."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        if folder.exists() and not folder.is_dir():
            raise QuantizeError(f"{folder} is no folder; give --cache a folder")
        self.folder, self.say = folder, say

    def read(self, key: dict[str, str], count: int) -> list[Score | None] | None:
        """The scores of `count` samples under this key, or None when there are none."""
        path = self._path(key)
        if not path.is_file():
            self._tell_nearest(key)
            return None
        try:
            scores = load(path) if _metadata(path) == key else None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError):
            scores = None
        if scores is None or len(scores) != count:
            self.say(f"{path} is damaged; the 16-bit model is run again")
            return None
        self.say(f"the 16-bit model's scores come from {path}")
        return scores

    def write(self, key: dict[str, str], scores: list[Score | None]) -> None:
        """Keep scores; the file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{os.getpid()}"
        try:
            save(partial, scores, key)
            partial.replace(self._path(key))
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, key: dict[str, str]) -> Path:
        return self.folder / f"teacher-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"

    def _tell_nearest(self, key: dict[str, str]) -> None:
        """Say in what the nearest file differs."""
        found = filter(None, map(_metadata, sorted(self.folder.glob("teacher-*.safetensors"))))
        differences = [[name for name in key if other.get(name) != key[name]] for other in found]
        if differences:
            what = min(differences, key=len)
            self.say(f"{self.folder} has no scores for this run (other {', '.join(what)}); the 16-bit model is run")


def _metadata(path: Path) -> dict[str, str]:
    """None of a damaged file."""
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
