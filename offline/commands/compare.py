"""`vlmq compare`: how near a quantised checkpoint is to its original."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmq_vllm.offline.commands.options import Json, Model, Quantized, say, settings_of, takes
from vlmq_vllm.offline.settings.compare import CompareSettings

COLUMNS = (  # heading, figure, factor, format
    ("KL", "kl", 1, ".2g"),
    ("top-1 %", "top1", 100, ".1f"),
    ("greedy same %", "greedy_same", 100, ".1f"),
    ("differs at", "first_difference", 1, ".1f"),
    ("NLL 16-bit", "nll_teacher", 1, ".4f"),
    ("NLL quantised", "nll_student", 1, ".4f"),
    ("change", "nll_difference", 1, ".4f"),
    ("exact % 16-bit", "exact_teacher", 100, ".1f"),
    ("exact % quantised", "exact_student", 100, ".1f"),
    ("change", "exact_difference", 100, ".1f"),
)


@takes(CompareSettings)
def compare(
    model: Model,
    quantized: Quantized,
    data: Annotated[
        str, typer.Option(help="Evaluation data: chats that end in a reference answer, as JSONL, folder or hf:NAME.")
    ],
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the 16-bit model's scores.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report as JSON to this file.")] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Compare QUANTIZED with its 16-bit original MODEL on reference answers: KL, agreement, NLL, exact match."""
    from vlmq_vllm.errors import QuantizeError

    chosen = settings_of(CompareSettings, settings)
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        state = "exists already" if out.exists() else "lies in no folder"
        raise QuantizeError(f"{out} {state}; choose another file for the report")
    from rich.console import Console

    from vlmq_vllm.offline.compare.run import compare as run
    from vlmq_vllm.offline.machine.progress import Progress

    report = run(model, quantized, data, chosen, cache, Progress(Console(stderr=True)), say)
    text = json.dumps(report, indent=2, allow_nan=False)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        _show(report)


def _show(report: dict) -> None:
    """Figures of every part of the data, intervals below them, and what the columns mean."""
    from vlmq_vllm.offline.commands.tables import show, table_of

    splits = report["splits"]
    shown = [column for column in COLUMNS if any(row[column[1]] for row in splits)]
    lines = [
        [row["split"], str(row["n"]), *(_cell(row[name], factor, form) for _, name, factor, form in shown)]
        for row in splits
    ]
    headings = ["n", *(heading for heading, *_ in shown)]
    show(table_of(lines, ["split", *headings], right=headings), _legend(report))


def _cell(figure: dict | None, factor: int, form: str) -> str:
    if figure is None:
        return "-"
    mean, low, high = (None if figure[k] is None else factor * figure[k] for k in ("mean", "low", "high"))
    return f"{mean:{form}}" + ("" if low is None else f"\n{low:{form}} .. {high:{form}}")


def _legend(report: dict) -> str:
    kl, tokens = report["kl"], report["max_new_tokens"]
    outcomes = "over the whole vocabulary" if kl["exact"] else f"over {kl['top']} tokens and the rest, a lower bound"
    lines = [
        "Means over samples with 95 % bootstrap intervals.",
        f"KL: of the quantised from the 16-bit model, nats per answer token, {outcomes}.",
        "Exact: every answer token is the likeliest after the right ones, so the greedy answer is the reference.",
    ]
    if tokens:
        lines.append(f"Greedy same: equal greedy answers up to {tokens} tokens.")
    if any(row["first_difference"] for row in report["splits"]):
        lines.append("Differs at: tokens before the first difference, of the greedy answers that differ.")
    return "\n".join(lines)
