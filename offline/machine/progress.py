"""Says what a run does: a bar on a terminal, plain lines everywhere else. Standard error only."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Item = TypeVar("Item")


class Progress:
    """Reports to `console`; the default is silent, for use as a library."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=True)

    def track(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """The items, with a bar and the time left where there is a terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = RichProgress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal)
        with bar:
            yield from bar.track(items, description=what)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
