"""Prints tables and lines for the terminal, as all commands do."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 240  # where there is no terminal, hardly anything is wrapped


def table_of(lines: Iterable[Sequence[str]], headings: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """A table, perhaps under headings, some of them to the right. Where it is too wide, its first column folds."""
    table = Table(box=box.SIMPLE, show_header=bool(headings), show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=number > 0, justify="right" if heading in right else "left")
    for line in lines:
        table.add_row(*line)
    return table


def show(*parts: Table | str) -> None:
    """Print tables, and texts, which are not wrapped."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
