"""`vlmq compare`: how near a quantised checkpoint is to its original."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmq_vllm.offline.commands.options import Json, Model, Quantized, settings_of, takes
from vlmq_vllm.offline.settings.compare import CompareSettings


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
    from vlmq_vllm.offline.compare.show import show
    from vlmq_vllm.offline.machine.progress import Progress

    def say(line: str) -> None:
        typer.echo(f"vlmq: {line}", err=True)

    report = run(model, quantized, data, chosen, cache, Progress(Console(stderr=True)), say)
    text = json.dumps(report, indent=2, allow_nan=False)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        show(report)
