"""Gives commands their options: those of a settings class in one stroke, and the arguments that several share."""

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.option import Option, options_of

Model = Annotated[str, typer.Argument(help="Folder of the 16-bit model, or its name on the Hugging Face hub.")]
Quantized = Annotated[Path, typer.Argument(help="Folder of a quantised checkpoint.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")]
Recipe = Annotated[
    Path | None, typer.Option(help="YAML with settings of vlmq quantize; options on the command line win.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def takes(settings: type) -> Callable[[Callable], Callable]:
    """A decorator: the command gets one option for each field of a settings class, in place of its **parameter.

    They stand after the parameters that must be given. What the command is called with has the names of the fields.
    """

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        first = [p for p in own if p.default is p.empty]
        made = [_parameter(one) for one in options_of(settings).values() if not one.recipe_only]
        rest = [p for p in own if p.default is not p.empty]
        command.__signature__ = inspect.Signature([*first, *made, *rest])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(declared: Option) -> inspect.Parameter:
    """What Typer reads: a type, a help text, and the choices in the place of the type's name."""
    kind, default = declared.type, declared.default
    if declared.several:
        kind = str | None
        default = None if default is None else ",".join(map(str, default))
    metavar = ("," if declared.several else "|").join(map(str, declared.choices)) or None
    info = typer.Option(help=declared.help, metavar=metavar, rich_help_panel=declared.panel)
    return inspect.Parameter(
        declared.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, info]
    )


def settings_of(settings: type, values: dict) -> Any:
    """The settings that a command was called with: lists are texts there, with commas between their members.

    Raises QuantizeError for words where numbers are asked for, and for settings that cannot be.
    """
    found = dict(values)
    for name, declared in options_of(settings).items():
        if declared.several and values[name] is not None:
            words = re.findall(r"[^,\s]+", values[name])
            try:
                listed = tuple(map(type(declared.choices[0]), words))
            except ValueError:
                raise QuantizeError(
                    f"{name} is {values[name]!r}; give numbers with commas between them, such as 2,3,4"
                ) from None
            found[name] = None if declared.default is None and not listed else listed
    return settings(**found)


def say(line: str) -> None:
    """A line for the user, on standard error."""
    typer.echo(f"vlmq: {line}", err=True)


def is_first() -> bool:
    """Whether this is the process, perhaps of several, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def given(context: typer.Context) -> dict:
    """The options that stand on the command line; the others leave the word to a recipe and to measured defaults."""
    said = {name: context.get_parameter_source(name) for name in context.params}
    return {n: v for n, v in context.params.items() if (source := said[n]) and source.name == "COMMANDLINE"}
