"""Says what a run does: a bar on a terminal, plain lines everywhere else. Standard error only."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from vlmq_vllm.offline.data.inputs import Intake
    from vlmq_vllm.offline.methods.solution import Row

log = logging.getLogger(__name__)


class Progress:
    """Reports to `console`; the default is silent, for use as a library."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=True)

    def track(self, items: Iterable[int], what: str) -> Iterator[int]:
        """The items, with a bar and the time left where there is a terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = RichProgress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal)
        with bar:
            yield from bar.track(items, description=what)

    def samples(self, intake: "Intake", wanted: int, tokens: int) -> None:
        """What became of the calibration data."""
        notes = [
            (intake.used < wanted, f"asked for {wanted}: there are no more that fit"),
            (intake.too_long, f"{intake.too_long} left out for their length"),
            (intake.shrunk, f"{intake.shrunk} pictures shrunk"),
        ]
        noted = "".join(f"; {note}" for holds, note in notes if holds)
        self._say(f"calibrating with {intake.used} samples, {tokens} tokens{noted}")

    def layer(self, name: str, rows: "list[Row]", damp: float) -> None:
        """One finished layer; linears that needed more than `damp` or were not solved are named on every console."""
        losses = [row.loss for row in rows if row.loss is not None]
        summed = f", loss {sum(losses):.3g}" if losses else ""
        tokens = Counter(row.tokens for row in rows if row.tokens != "equal")
        noted = "".join(f", {count} with {what}" for what, count in tokens.items())
        self._say(f"{name}: {len(rows)} linears{summed}{noted}")
        for row in rows:
            if row.damp is not None and row.damp > damp:
                log.warning("%s needed a damping of %.2g instead of %.2g", row.module, row.damp, damp)
            if row.loss is not None and row.damp is None:
                log.warning("%s was rounded to nearest: its Hessian stayed singular under damping", row.module)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
