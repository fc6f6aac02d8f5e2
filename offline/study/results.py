"""The folder of a study: what makes it this study, and one line per configuration in `results.jsonl`.

identity.json   what decides the numbers; a study that goes on must have the same
pieces/         solved linears (`pieces.py`)
results.jsonl   one configuration per line, in the order in which they were run
results.csv, pareto.csv, pareto.png, report.md, recipe.yaml   written at the end, anew each time
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.settings import KEPT
from vlmq_vllm.offline.writer import check_destination

IDENTITY, RESULTS = "identity.json", "results.jsonl"


def key_of(widths: dict[str, int]) -> str:
    """Names a configuration by its linears (in-memory names), whatever the parts were called."""
    text = "\n".join(f"{linear} {bits}" for linear, bits in sorted(widths.items()) if bits != KEPT)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Results:
    """`with Results(folder, identity, resume) as results:`; one process at a time.

    Raises QuantizeError where the folder cannot be created, RefusedError for one that is there and is not to be gone
    on with, is another study, or is being written.
    """

    def __init__(self, folder: Path, identity: dict, resume: bool) -> None:
        self.folder = folder
        there = folder.is_dir() and any(folder.iterdir())
        if there and not (folder / IDENTITY).is_file():
            raise RefusedError(f"{folder} is no folder of a study; choose another")
        if there and not resume:
            raise RefusedError(
                f"{folder} holds a study already; add --resume to go on with it, or choose another folder"
            )
        if not there:
            if not folder.is_dir():
                check_destination(folder)
            folder.mkdir(exist_ok=True)
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            self._begin(identity, there)
        except BaseException:
            os.close(self.lock)
            raise

    def _begin(self, identity: dict, there: bool) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RefusedError(f"another process is writing {self.folder}; wait for it or choose another") from None
        if there:
            _check_same(self.folder, identity)
        else:
            partial = self.folder / f"{IDENTITY}.partial"
            partial.write_text(json.dumps(identity, indent=2) + "\n")
            partial.replace(self.folder / IDENTITY)
        self.rows = {(row["method"], row["key"]): row for row in _whole_lines(self.folder / RESULTS)}

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind, error, trace) -> None:
        os.close(self.lock)

    def find(self, method: str, widths: dict[str, int]) -> dict | None:
        """The row of a configuration, None where it has not been run."""
        return self.rows.get((method, key_of(widths)))

    def add(self, row: dict) -> None:
        """Append a row; it has at least "method" and "key"."""
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["method"], row["key"]] = row


def _check_same(folder: Path, identity: dict) -> None:
    before = json.loads((folder / IDENTITY).read_text())
    for key in sorted(identity.keys() | before.keys()):
        if before.get(key) != identity.get(key):
            raise RefusedError(
                f"the study in {folder} had {key} {before.get(key)!r}, this one has {identity.get(key)!r}; give the "
                "same, or choose another folder"
            )


def _whole_lines(path: Path) -> list[dict]:
    """Rows that are there in full; what a killed run left of a last line goes."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]
