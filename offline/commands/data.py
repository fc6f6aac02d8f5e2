"""`vlmq data inspect`: what calibration data holds, before hours are spent on it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vlmq_vllm.offline.commands.options import Json

SHOWN = 3  # lines that are named of those that occur twice

data = typer.Typer(help="Look at calibration data.", no_args_is_help=True)


@data.callback()
def group() -> None:
    """Keeps `inspect` a subcommand: Typer makes a group of one command that command."""


@data.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="JSONL of chats, folder of pictures, or hf:NAME/CONFIG@SPLIT (the last two may go)."
        ),
    ],
    model: Annotated[str, typer.Option(help="Count tokens with this model's processor: folder or hub name.")] = "",
    against: Annotated[str, typer.Option(help="Evaluation data that DATA must not share chats or pictures with.")] = "",
    samples: Annotated[
        int | None, typer.Option(help="With --model: samples that a run would use; default: all.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --model: leave out longer samples.")] = 2048,
    max_pixels: Annotated[int | None, typer.Option(help="With --model: shrink larger pictures to this.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which samples are drawn.")] = 42,
    as_json: Json = False,
) -> None:
    """Show what DATA holds: pictures, duplicates, tokens, and what it shares with evaluation data."""
    from vlmq_vllm.offline.data.fingerprint import marks, shared
    from vlmq_vllm.offline.data.read import read_all, read_chats
    from vlmq_vllm.offline.data.survey import survey

    chats = read_chats(source, seed)
    own = [marks(chat) for chat in chats]
    found = survey(chats, own)
    if model:
        found["tokens"] = _tokens(chats, model, len(chats) if samples is None else samples, max_tokens, max_pixels)
    if against:
        both = shared(own, [marks(chat) for chat in read_all(against)])
        found["overlap"] = dict(zip(("chats", "pictures"), both, strict=True))
    from vlmq_vllm.offline.commands.tables import show, table_of

    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(table_of(_rows(found, max_tokens, source)))


def _tokens(chats: list[dict], model: str, limit: int, max_tokens: int, max_pixels: int | None) -> dict:
    from vlmq_vllm.headers import read_config
    from vlmq_vllm.offline.data.inputs import load_processor
    from vlmq_vllm.offline.data.survey import survey_tokens
    from vlmq_vllm.offline.data.token_kinds import vision_ids
    from vlmq_vllm.offline.model.source import find

    folder: Path = find(model)
    vision = vision_ids(read_config(folder))
    return survey_tokens(chats, load_processor(folder), vision, limit, max_tokens, max_pixels)


def _rows(found: dict, max_tokens: int, source: str) -> list[tuple[str, str]]:
    rows = [
        ("samples", f"{found['samples']}, {found['text_only'] / found['samples']:.0%} of them without a picture"),
        ("pictures, videos", f"{found['pictures']}, {found['videos']}"),
    ]
    if found["tasks"]:
        rows.append(("tasks", ", ".join(f"{task} {count}" for task, count in found["tasks"].items())))
    if found["sizes"]:
        sizes = ", ".join(f"{name} {width}x{height}" for name, (width, height) in found["sizes"].items())
        rows.append(("pixels", sizes))
    rows.append(("chats given twice", _named(found["duplicates"]["chats"], source)))
    rows.append(("with a picture given twice", _named(found["duplicates"]["pictures"], source)))
    if "tokens" in found:
        rows += _token_rows(found["tokens"], max_tokens)
    if "overlap" in found:
        rows.append(("also in the evaluation data", _named(found["overlap"]["chats"], source)))
        rows.append(("with a picture of it", _named(found["overlap"]["pictures"], source)))
    return rows


def _token_rows(tokens: dict, max_tokens: int) -> list[tuple[str, str]]:
    unknown = "unknown: the chat template rewrites texts"
    kinds = {kind: unknown if count is None else str(count) for kind, count in tokens["kinds"].items()}
    lengths = ", ".join(f"{name} {length}" for name, length in tokens["lengths"].items())
    return [
        ("samples used", f"{tokens['used']}; {tokens['too_long']} left out with more than {max_tokens} tokens"),
        ("pictures shrunk", str(tokens["shrunk"])),
        ("tokens per sample", lengths),
        ("vision tokens", kinds["vision"]),
        ("user's text", kinds["user"]),
        ("assistant's answers", kinds["answer"]),
        ("template and special", kinds["special"]),
    ]


def _named(lines: list[str], source: str) -> str:
    """How many, and the first of them."""
    if not lines:
        return "0"
    first = ", ".join(line.removeprefix(source).lstrip("/ ") for line in lines[:SHOWN])
    return f"{len(lines)}: {first}{', ...' if len(lines) > SHOWN else ''}"
