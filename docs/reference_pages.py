"""Writes the reference pages that are made from the code: the command line, and the settings with their defaults.

What a page says of an option stands where the option is declared (`offline/settings/option.py`). Loads no torch.
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from vlmq_vllm.offline.commands.app import app
from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.settings.methods import ALPHA, METHODS, TOKEN_WEIGHTS, defaults_of, unread
from vlmq_vllm.offline.settings.option import options_of
from vlmq_vllm.offline.settings.quantize import BITS, Settings
from vlmq_vllm.offline.settings.sweep import StudySettings

MADE = "<!-- Made from the code by `make docs`. Change the code instead, then run it again. -->"
KINDS = {bool: "", int: "integer", float: "number", Path: "path", dict: "mapping"}  # others: text


def command_line() -> str:
    """The page of all commands: for each what it does, its arguments and its options."""
    found = list(commands())
    rows = [f"| [`{name}`](#{name.replace(' ', '-')}) | {_first_sentence(command.help)} |" for name, command in found]
    head = f"""# Command line

{MADE}

`vlmq COMMAND --help` prints the same. Options may be written in kebab or snake case (`--group-size`, `--group_size`).
`python -m vlmq_vllm.offline` is the same program.

"""
    return head + _table("command", "what it does", rows=rows) + "".join(_command(*one) for one in found)


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its whole name, such as "vlmq data inspect"."""
    yield from _below("vlmq", typer.main.get_command(app))


def parameters_of(command: Any) -> list[Any]:
    """What a command takes on the command line: arguments and options, without --help."""
    return [parameter for parameter in command.params if "--help" not in parameter.opts]


def settings() -> str:
    """The page of all settings and methods, with what is taken where nothing is given."""
    return f"""# Settings

{MADE}

A recipe (`--recipe FILE.yaml`) holds the settings of `vlmq quantize` by their names. Options of the command line win
over the recipe. The recipe of a run lies beside its weights, as `vlmq_recipe.yaml`. In Python settings are arguments of
the classes below. An unknown key and a value that cannot be are refused.

## vlmq quantize, vlmq plan

{_class(Settings)}
## Methods

{_methods()}
### Token weights

{_token_weights()}
### Defaults by method and width

What a setting becomes that is not given. A dash: such a run makes no use of it.

{_defaults()}
## vlmq sweep

{_class(StudySettings)}
## vlmq compare

{_class(CompareSettings)}"""


def _below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    for inner, found in getattr(command, "commands", {}).items():
        yield from _below(f"{name} {inner}", found)
    if not hasattr(command, "commands"):
        yield name, command


def _command(name: str, command: Any) -> str:
    arguments = [p for p in parameters_of(command) if p.param_type_name == "argument"]
    options = [p for p in parameters_of(command) if p.param_type_name == "option"]
    needed = [f"{p.opts[0]} {p.name.upper()}" for p in options if p.required]
    usage = " ".join([name, *(metavar(p) for p in arguments), *needed, *(["[OPTIONS]"] if options else [])])
    text = f"\n## {name}\n\n{inspect.cleandoc(command.help)}\n\n```\n{usage}\n```\n"
    if arguments:
        rows = [f"| `{metavar(p)}` | {_cell(p.help)} |" for p in arguments]
        text += "\n" + _table("argument", "", rows=rows)
    signature = inspect.signature(inspect.unwrap(command.callback)).parameters
    for panel in dict.fromkeys(p.rich_help_panel for p in options):
        rows = [_option(p, signature[p.name].annotation) for p in options if p.rich_help_panel == panel]
        text += "\n" + _table(panel or "Options", "", "default", "", rows=rows)
    return text


def _option(option: Any, kind: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    metavar = option.metavar or ""
    takes = ("list of " if "," in metavar else "") + _takes(re.findall(r"[^|,]+", metavar), kind)
    default = "required" if option.required else _value(option.default)
    return f"| {names} | {takes} | {default} | {_cell(option.help)} |"


def _class(found: type) -> str:
    """A settings class: what its docstring says, and its settings with choices, defaults and help."""
    rows = []
    for name, one in options_of(found).items():
        takes = ("list of " if one.several else "") + _takes(one.choices, one.type)
        rows.append(f"| `{name}` | {takes} | {_value(one.default) or 'open'} | {_cell(one.help)} |")
    head = f"`{found.__module__}.{found.__qualname__}`\n\n{inspect.getdoc(found)}\n\n"
    return head + _table("setting", "", "default", "what it decides", rows=rows)


def _methods() -> str:
    rows = []
    for name, method in METHODS.items():
        data = "yes" if method.calibrated else "no"
        weights = ", ".join(f"`{one}`" for one in method.token_weights)
        sweeps = "yes" if method.studied else "no"
        rounded = "yes" if method.rounds_activations else "no"
        rows.append(f"| `{name}` | {_cell(method.help)} | {data} | {weights} | {rounded} | {sweeps} |")
    heads = ("method", "what it does", "needs data", "token weights", "8-bit activations", "`vlmq sweep`")
    return _table(*heads, rows=rows)


def _token_weights() -> str:
    rows = [f"| `{name}` | {_cell(weights.help)} |" for name, weights in TOKEN_WEIGHTS.items()]
    return _table("`--saliency`", "what weighs tokens", rows=rows)


def _defaults() -> str:
    """For every method and width what settings without a value become; one row where widths agree."""
    names = [field.name for field in dataclasses.fields(Settings) if field.default is None]
    rows = []
    for method in METHODS:
        by_width: dict[tuple, list[int]] = {}
        for bits in BITS:
            chosen = defaults_of(method, bits)
            chosen["alpha"] = ALPHA[chosen["base"]]
            idle = unread(method, chosen["saliency"], names)
            values = tuple("-" if name in idle else _value(chosen.get(name)) or "open" for name in names)
            by_width.setdefault(values, []).append(bits)
        rows += [f"| `{method}` | {_list(bits)} | {' | '.join(values)} |" for values, bits in by_width.items()]
    return _table("method", "bits", *(f"`{name}`" for name in names), rows=rows)


def _table(*heads: str, rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *rows, ""])


def _takes(choices: Any, kind: Any) -> str:
    """What a value may be: its choices, or its type in a word."""
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    while get_origin(kind) is Annotated or get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return KINDS.get(kind, "text")


def _value(value: Any) -> str:
    """A default in a cell of a table; nothing where it is left open."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{_list(value)}`" if isinstance(value, tuple | list) else f"`{value}`"


def metavar(argument: Any) -> str:
    """How the page and --help call an argument."""
    return argument.metavar or argument.name.upper()


def _list(values: Any) -> str:
    return ",".join(map(str, values))


def _cell(text: str | None) -> str:
    """A text in a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def _first_sentence(text: str) -> str:
    return _cell(re.split(r"(?<=\.)\s", text.strip())[0])
