"""Writes a checkpoint so that nothing unfinished ever looks finished, and nothing finished is lost.

Everything goes to a hidden folder `.NAME.partial` beside the destination, one file per unit (a layer, say). Each is
written aside, compared bit by bit and renamed; what it adds to the report lies beside it. SHA256SUMS is made last; then
the folder gets its name. A run that ends early leaves the hidden folder behind if a unit has been finished:
`resume=True` goes on from there, if `identity` is the same.
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vlmq_vllm.errors import CheckpointError, QuantizeError, RefusedError
from vlmq_vllm.headers import INDEX, read_headers
from vlmq_vllm.offline.checkpoint.atomic import aside, check_written, is_about_space

SUMS = "SHA256SUMS"
REPORT = "vlmq_report.json"
RECIPE = "vlmq_recipe.yaml"
LOG = ".progress"  # folder of what each unit adds to the report; gone when the checkpoint is finished
IDENTITY = "identity.json"  # in it
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
OTHERS = ("quantize_config.json", "quantization_config.json", "recipe.yaml")  # how another tool quantised the source
NOT_COPIED = ("config.json", INDEX, SUMS, REPORT, RECIPE, *OTHERS)


class Parts:
    """The units of a checkpoint in the making: which are there, and where. Any process may look."""

    def __init__(self, out: Path, units: list[str]) -> None:
        self.units = units
        self.folder = out.absolute().parent / f".{out.name}.partial"

    def file(self, unit: str) -> Path:
        return self.folder / f"model-{self.units.index(unit) + 1:05d}-of-{len(self.units):05d}.safetensors"

    def begun(self) -> bool:
        """Whether any unit has been written, perhaps by a run with other units."""
        return any(self.folder.glob("model-*-of-*.safetensors"))

    def done(self, unit: str) -> bool:
        return self.file(unit).is_file()


class Writer(Parts):
    """`with Writer(out, bytes, units) as writer:` then `add` for each unit that is not `done`, then `finish`.

    identity: what decides the bytes; without one a run cannot be resumed. Raises RefusedError where there is too little
    room or an unfinished run that must be decided about.
    """

    def __init__(
        self, out: Path, needed: int, units: list[str], identity: dict | None = None, resume: bool = False
    ) -> None:
        check_destination(out)
        super().__init__(out, units)
        self.out, self.identity = out, identity
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.lock)
            raise RefusedError(f"another process is writing {out}; wait for it or choose another folder") from None
        try:
            self._begin(needed, resume)
        except BaseException:
            self._leave()
            raise

    def _begin(self, needed: int, resume: bool) -> None:
        if self.identity is not None and self.begun():
            self._go_on(self.identity, resume)
        else:
            for stale in self.folder.iterdir():
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            (self.folder / LOG).mkdir()
            (self.folder / LOG / IDENTITY).write_text(json.dumps(self.identity))
        there = sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if free < needed - there:
            raise RefusedError(
                f"{self.folder.parent} has {_size(free)} free, the checkpoint needs {_size(needed - there)}; make room"
            )

    def _go_on(self, identity: dict, resume: bool) -> None:
        anew = f"remove {self.folder} to begin anew"
        if not resume:
            raise RefusedError(
                f"{self.out} has an unfinished run ({sum(map(self.done, self.units))} of {len(self.units)} parts); "
                f"add --resume to go on with it, or {anew}"
            )
        try:
            before = json.loads((self.folder / LOG / IDENTITY).read_text())
        except (OSError, ValueError):
            raise RefusedError(f"the unfinished run of {self.out} does not say what it was; {anew}") from None
        for key in sorted(identity.keys() | before.keys()):
            if before.get(key) != identity.get(key):
                raise RefusedError(
                    f"the unfinished run of {self.out} had {key} {before.get(key)!r}, this one has "
                    f"{identity.get(key)!r}; give the same, or {anew}"
                )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # what is wrong with the input stays wrong: there is nothing to go on with
        hopeless = isinstance(error, CheckpointError | QuantizeError) and not isinstance(error, RefusedError)
        kept = self._leave(hopeless)
        if isinstance(error, OSError | SafetensorError) and is_about_space(error):
            advice = "make room and add --resume to go on" if kept else "make room and run again"
            raise RefusedError(f"no space left while writing {self.out}; {advice}") from error

    def _leave(self, hopeless: bool = False) -> bool:
        """Let go of the hidden folder; it goes away unless a unit has been finished in it."""
        kept = self.identity is not None and not hopeless and self.begun()
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)  # renamed away when finished
        os.close(self.lock)
        return kept

    def add(self, unit: str, tensors: dict[str, torch.Tensor], notes: list[dict] | None = None) -> None:
        """Write one unit and compare it with what was meant. `notes` come back from `notes`."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with aside(self.file(unit)) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # safetensors makes files private
            check_written(partial, tensors)
            (self.folder / LOG / f"{unit}.json").write_text(json.dumps(notes or []))

    def notes(self) -> list[dict]:
        return [note for unit in self.units for note in json.loads((self.folder / LOG / f"{unit}.json").read_text())]

    def finish(self, source: Path, config: dict, report: dict, recipe: str | None = None) -> None:
        """Add what belongs to the model beside its weights, then give the folder its name."""
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in WEIGHTS and path.name not in NOT_COPIED and path.name[0] != ".":
                shutil.copyfile(path, self.folder / path.name)
        headers = read_headers(self.folder)
        total = sum(info.nbytes for info in headers.values())
        weight_map = {name: info.file for name, info in headers.items()}
        self._json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._json("config.json", config)
        self._json(REPORT, report)
        if recipe is not None:
            (self.folder / RECIPE).write_text(recipe)
        files = sorted(path for path in self.folder.iterdir() if path.is_file() and path.name != SUMS)
        (self.folder / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
        self.folder.chmod(0o755)
        self.folder.rename(self.out)
        shutil.rmtree(self.out / LOG)  # last: until the rename a run may still have to be resumed

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


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
