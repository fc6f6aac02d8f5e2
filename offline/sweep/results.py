"""Opens the folder of a study and keeps its rows, one for each configuration that has been run.

study.json   what decides the numbers (`identity.py`; a study that goes on must have the same), and the rows
pieces/      solved linears (`pieces.py`)
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

STUDY = "study.json"
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
        if not any(path.name != STUDY + ASIDE for path in self.folder.iterdir()):  # what a kill may leave
            return
        path = self.folder / STUDY
        if not path.is_file():
            raise RefusedError(f"{self.folder} is no folder of a study; choose another")
        if not resume:
            raise RefusedError(
                f"{self.folder} holds a study already; add --resume to go on with it, or choose another folder"
            )
        try:
            found = json.loads(path.read_bytes())
            self.identity = dict(found["identity"])
            self.rows = {(row["method"], row["key"]): row for row in found["rows"]}
        except (ValueError, KeyError, TypeError):
            raise RefusedError(
                f"{path} is damaged; remove {self.folder} to begin anew, or choose another folder"
            ) from None

    def begin(self, identity: dict) -> None:
        """Make the folder that of the study `identity`. Raises RefusedError where it is another's."""
        self.identity = identity if self.identity is None else continued(self.folder, self.identity, identity)
        self._write()

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
        """Keep a row: `COLUMNS` and "key"."""
        self.rows[row["method"], row["key"]] = row
        self._write()

    def _write(self) -> None:
        with aside(self.folder / STUDY) as partial:
            content = {"identity": self.identity, "rows": list(self.rows.values())}
            partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
