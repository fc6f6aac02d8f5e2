"""`vlmq compare`: how near a quantised checkpoint is to its original."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vlmq_vllm.offline.commands.options import Json, Model, Quantized


def compare(
    model: Model,
    quantized: Quantized,
    data: Annotated[
        str, typer.Option(help="Evaluation data: chats that end in a reference answer, as JSONL, folder or hf:NAME.")
    ],
    samples: Annotated[int | None, typer.Option(help="Use so many chats, drawn by --seed; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer chats.")] = 4096,
    top: Annotated[int, typer.Option(help="Likeliest tokens in the KL divergence; the rest counts as one.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Length of greedy answers; 0: generate none.")] = 32,
    backend: Annotated[str, typer.Option(help="hf (transformers, unpacked weights) or vllm (as served).")] = "hf",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, for both models.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="For hf: cpu, cuda, cuda:1 ...; default: a GPU if there is one.")] = "",
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the 16-bit model's scores.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the drawn chats and the bootstrap.")] = 42,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report as JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare QUANTIZED with its 16-bit original MODEL on reference answers: KL, agreement, NLL, exact match."""
    from vlmq_vllm.errors import QuantizeError
    from vlmq_vllm.offline.settings.compare import Settings

    settings = Settings(
        backend=backend,
        dtype=dtype,
        device=device,
        top=top,
        new_tokens=max_new_tokens,
        samples=samples,
        max_tokens=max_tokens,
        seed=seed,
    )
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        state = "exists already" if out.exists() else "lies in no folder"
        raise QuantizeError(f"{out} {state}; choose another file for the report")
    from rich.console import Console

    from vlmq_vllm.offline.compare.run import compare as run
    from vlmq_vllm.offline.compare.show import show
    from vlmq_vllm.offline.machine.progress import Progress

    def say(line: str) -> None:
        typer.echo(f"vlmq: {line}", err=True)

    report = run(model, quantized, data, settings, cache, Progress(Console(stderr=True)), say)
    text = json.dumps(report, indent=2, allow_nan=False)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        show(report)
