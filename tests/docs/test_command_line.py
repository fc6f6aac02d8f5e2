"""Every command and option is described, and the pages that are made from the code are up to date."""

import pytest

import reference_pages
import write_pages

COMMANDS = dict(reference_pages.commands())
PAGE = reference_pages.command_line()
PARAMETERS = [(name, option) for name, command in COMMANDS.items() for option in reference_pages.parameters_of(command)]


@pytest.mark.parametrize("path", write_pages.MADE, ids=lambda path: path.name)
def test_made_files_are_up_to_date(path):
    """If not: run `make docs` and commit what it changes."""
    assert path.read_text(encoding="utf-8") == write_pages.MADE[path]()


def test_there_are_commands():
    assert {"vlmq quantize", "vlmq data inspect"} <= COMMANDS.keys() and len(PARAMETERS) > 50


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_described(name):
    assert COMMANDS[name].help and f"\n## {name}\n" in PAGE


@pytest.mark.parametrize(("name", "option"), PARAMETERS, ids=lambda part: getattr(part, "name", part))
def test_options_are_described(name, option):
    """In their help and in the page."""
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    shown = option.opts if option.param_type_name == "option" else [reference_pages.metavar(option)]
    assert len((option.help or "").split()) > 1, f"{name} {option.opts[0]} has no help"
    assert all(f"`{spelling}`" in section for spelling in shown)
