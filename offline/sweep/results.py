"""Opens the folder of a study and keeps its rows: one line per configuration in `results.jsonl`.

identity.json   what decides the numbers (`identity.py`); a study that goes on must have the same
pieces/         solved linears (`pieces.py`)
results.jsonl   one configuration per line, in the order in which they were run
results.csv, pareto.csv, pareto.png, report.md, recipe.yaml   written at the end, anew each time (`report.py`)
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.checkpoint.atomic import ASIDE, aside, is_about_space
from vlmq_vllm.offline.checkpoint.writer import check_destination
from vlmq_vllm.offline.settings.quantize import KEPT
from vlmq_vllm.offline.sweep.identity import continued

IDENTITY, RESULTS = "identity.json", "results.jsonl"
COLUMNS = ("method", "label", "bits_per_weight", "bits_per_parameter", "kl", "kl_error", "nll", "exact")


def key_of(widths: dict[str, int]) -> str:
    """Names a configuration by its linears (in-memory names), whatever the parts were called."""
    text = "\n".join(f"{linear} {bits}" for linear, bits in sorted(widths.items()) if bits != KEPT)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Results:
    """`with Results(folder, resume) as results:` then `begin`; one process at a time.

    identity: of the study that is there, None for a new one. Raises QuantizeError where the folder cannot be created,
    RefusedError for one that is there and is not to be gone on with, is damaged, or is being written. A new folder
    goes away again if nothing is written into it.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.created = folder, not folder.is_dir()
        self.identity: dict | None = None
        self.rows: dict[tuple[str, str], dict] = {}
        if self.created:
            check_destination(folder)
            folder.mkdir()
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            self._open(resume)
        except BaseException:
            self._leave()
            raise

    def _open(self, resume: bool) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RefusedError(f"another process is writing {self.folder}; wait for it or choose another") from None
        if not any(path.name != IDENTITY + ASIDE for path in self.folder.iterdir()):  # what a kill may leave
            return
        if not (self.folder / IDENTITY).is_file():
            raise RefusedError(f"{self.folder} is no folder of a study; choose another")
        if not resume:
            raise RefusedError(
                f"{self.folder} holds a study already; add --resume to go on with it, or choose another folder"
            )
        self.identity = _read_identity(self.folder)
        self.rows = {(row["method"], row["key"]): row for row in _read_rows(self.folder / RESULTS)}

    def begin(self, identity: dict) -> None:
        """Make the folder that of the study `identity`. Raises RefusedError where it is another's."""
        wanted = identity if self.identity is None else continued(self.folder, self.identity, identity)
        if wanted != self.identity:
            with aside(self.folder / IDENTITY) as partial:
                partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        self.identity = wanted

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._leave()
        if isinstance(error, OSError | SafetensorError) and is_about_space(error):
            advice = "run again" if self.identity is None else "add --resume to go on"
            raise RefusedError(f"no space left while writing {self.folder}; make room and {advice}") from error

    def _leave(self) -> None:
        if self.created and not any(self.folder.iterdir()):
            self.folder.rmdir()
        os.close(self.lock)

    def find(self, method: str, widths: dict[str, int]) -> dict | None:
        """The row of a configuration, None where it has not been run."""
        return self.rows.get((method, key_of(widths)))

    def add(self, row: dict) -> None:
        """Append a row: `COLUMNS` and "key"."""
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["method"], row["key"]] = row


def _read_identity(folder: Path) -> dict:
    found = _parsed((folder / IDENTITY).read_bytes())
    if found is None:
        raise RefusedError(
            f"{folder / IDENTITY} is damaged, so that nothing says which study this is; remove {folder} to begin anew, "
            "or choose another folder"
        )
    return found


def _read_rows(path: Path) -> list[dict]:
    """All rows. The last line goes where it is not whole: what a kill or a full disk left of it is measured again."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    rows = [_row(line) for line in lines]
    if rows and rows[-1] is None:
        os.truncate(path, len(content) - len(lines[-1]))
        rows.pop()
    if None in rows:
        raise RefusedError(
            f"{path} is damaged in line {rows.index(None) + 1}; remove that line, and --resume measures its "
            "configuration again"
        )
    return [row for row in rows if row]


def _row(line: bytes) -> dict | None:
    """The row of a whole line, None for a damaged one."""
    row = _parsed(line) if line.endswith(b"\n") else None
    return row if row and row.keys() >= {"key", *COLUMNS} else None


def _parsed(content: bytes) -> dict | None:
    """A JSON object, None for anything else."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
