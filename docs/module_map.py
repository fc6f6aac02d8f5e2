"""Writes the page that says of every module of the library what it does: the first sentence of its docstring."""

import ast
import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("offline", "vlmq_vllm", "kernels")


def modules() -> str:
    """The page, a table for each folder."""
    paths = sorted((path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), key=_place)
    tables = []
    for folder, files in groupby(paths, key=lambda path: path.parent):
        rows = [f"| {path.name} | {first_sentence(path)} |" for path in files]
        tables.append(f"## {folder.relative_to(ROOT)}/\n\n| file | |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    head = """# What lives where

<!-- Made from the code by `make docs`. Change the code instead, then run it again. -->

Every file of the library with what it does. How they work together: [architecture](../explanation/architecture.md).

"""
    return head + "\n".join(tables)


def first_sentence(path: Path) -> str:
    """Of a module's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"\.(?: |$)|:$", text)[0].replace("|", "\\|").replace("`", "")


def _place(path: Path) -> tuple[int, str, str]:
    relative = path.relative_to(ROOT)
    return PACKAGES.index(relative.parts[0]), str(relative.parent), path.name
