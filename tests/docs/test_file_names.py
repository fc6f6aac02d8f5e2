"""Every file that a page or a docstring names between back-ticks exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A Python file, another file with its folder, or a folder: `format.py`, `tests/foreign/README.md`, `kernels/`.
NAMED = re.compile(
    r"`([\w.][\w./-]*\.py"
    r"|[\w.-]+/[\w./-]*\.(?:md|txt|json|jsonl|toml|yml)"
    r"|(?:[\w.-]+/)+)(?:::\w+)?`"
)
STANDS_FOR = re.compile(r"\b[A-Z]{2,}\b(?!\.md)")  # a part of a name that stands for others: `tuned/ARCH.json`
PACKAGES = ("vlmq_vllm", "kernels", "offline", "vlmq_vllm/serving")
FOLDERS = ("vlmq_vllm", "kernels", "offline", "benchmarks", "tests", "examples", "docs", "packaging")
LOGS = ("NOTES.md",)  # dated: it names files that were


def written() -> list[Path]:
    """All pages and all Python files, but for this one, which names files that are not there."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    pages = [path for path in ROOT.glob("*.md") if path.name not in LOGS]
    return sorted(path for path in (*pages, *below) if path != Path(__file__))


def places(path: Path) -> list[Path]:
    """Where a file that `path` names may lie: beside it, in its package or in the repository; a page may name one as
    it lies in any package."""
    top = ROOT / path.relative_to(ROOT).parts[0]
    own = [path.parent, top] if top.is_dir() else [path.parent]
    return [*own, ROOT, *((ROOT / package for package in PACKAGES) if path.suffix == ".md" else ())]


def missing(path: Path) -> list[str]:
    """Names of files and of folders of the repository in `path` that do not exist, with their lines."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in NAMED.finditer(text):
        name = match[1]
        exists = any((place / name).exists() for place in places(path))
        if not exists and not STANDS_FOR.search(name):
            found.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {name}")
    return found


def test_named_files_exist():
    assert [line for path in written() for line in missing(path)] == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see `gone.py`", ["gone.py"]),
        ("see `settings/gone.py` and `commands/app.py`", ["settings/gone.py"]),
        ("`gone/README.md`, `tuned/ARCH.json`, `config.json`, `offline/gone/`", ["gone/README.md", "offline/gone/"]),
        ("`app.py`, `offline/commands/app.py`, `vlmq_vllm/format.py`, `format.py`", ["format.py"]),
    ],
)
def test_missing_files_are_found(text, names, tmp_path, monkeypatch):
    """In a docstring beside offline/commands/app.py."""
    path = ROOT / "offline/commands/app.py"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert [line.split(": ")[1] for line in missing(path)] == names
