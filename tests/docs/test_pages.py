"""Pages: the README is short, links and names of the API lead somewhere, every page is in the menu."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
READ_ON_THEIR_OWN = sorted(path for path in ROOT.glob("*.md") if path.name != "NOTES.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_readme_is_short():
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) < 700


@pytest.mark.parametrize("path", [*READ_ON_THEIR_OWN, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not heading or heading in headings(target), f"{path.name} links to {link}"


def test_every_page_is_in_the_menu():
    found = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(found) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES)


def test_pages_need_no_network():
    """Nothing in the theme's settings that is fetched by the reader's browser."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert not [url for key in ("extra_css", "extra_javascript") for url in config.get(key, ()) if "//" in url]


def headings(path: Path) -> set[str]:
    """Anchors of a page's headings, as MkDocs and GitHub make them of plain words."""
    lines = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


def test_documented_names_of_the_api_exist():
    """What mkdocstrings is asked for, which only a build would miss."""
    text = (ROOT / "docs/reference/python-api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: ([\w.]+)$", text, flags=re.M)
    assert names
    for name in names:
        module, _, what = name.rpartition(".")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        assert what in {getattr(node, "name", "") for node in tree.body}, name
