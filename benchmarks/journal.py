"""Keeps what a benchmark found so far, line by line, so that a run that ends early leaves what it had.

A line is a dict with a "kind"; which kinds there are is the report's business.
"""

import json
from collections.abc import Callable
from pathlib import Path


class Journal:
    """All lines so far, in FILE as well when there is one; the tables, which `report` makes, go beside it."""

    def __init__(self, out: Path | None, report: Callable[[list[dict]], str]) -> None:
        self.lines: list[dict] = []
        self.out, self.report = out, report
        if out:
            out.write_text("")

    def add(self, kind: str, **fields) -> None:
        self.lines.append({"kind": kind} | fields)
        if self.out:
            with self.out.open("a") as file:
                print(json.dumps(self.lines[-1]), file=file)

    def tables(self) -> str:
        text = self.report(self.lines)
        if self.out:
            self.out.with_suffix(".md").write_text(text)
        return text

    def drop(self, unwanted: Callable[[dict], bool]) -> None:
        """Forget the lines that are unwanted, and the tables, which may tell of them."""
        self.lines = [line for line in self.lines if not unwanted(line)]
        if self.out:
            self.out.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            self.out.with_suffix(".md").unlink(missing_ok=True)
