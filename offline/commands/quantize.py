"""`vlmq quantize`: the options of a run, and the run."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vlmq_vllm.offline.commands.options import Device, Json, Model, Out, Recipe, given, is_first, say, takes
from vlmq_vllm.offline.commands.stopping import stop_on_sigterm
from vlmq_vllm.offline.settings.quantize import Settings


@takes(Settings)
def quantize(
    context: typer.Context,
    model: Model,
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(help="Calibration data: JSONL of chats, a folder of pictures with captions, or hf:NAME."),
    ] = None,
    device: Device = "",
    recipe: Recipe = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run.")] = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Quantise MODEL and write a checkpoint that vLLM serves."""
    from vlmq_vllm.offline.machine.device import default_device
    from vlmq_vllm.offline.machine.malloc import give_back_large_blocks
    from vlmq_vllm.offline.settings.methods import unread
    from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from

    options = given(context)
    chosen = settings_from(read_recipe(recipe) if recipe else {}, options)
    from rich.console import Console

    from vlmq_vllm.offline.machine.progress import Progress
    from vlmq_vllm.offline.run import quantize as run

    give_back_large_blocks()
    first = is_first()
    if first and (idle := unread(chosen.method, chosen.saliency, list(options))):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        say(f"method {chosen.method} makes no use of {named}")
    progress = Progress(Console(stderr=True)) if first else Progress()
    rows = run.quantize(model, out, data, chosen, default_device(device), progress, resume, stop_on_sigterm())
    if first and as_json:
        modules = [asdict(row) for row in rows]
        typer.echo(json.dumps({"out": str(out), "settings": chosen.to_dict(), "modules": modules}, indent=2))
    elif first:
        typer.echo(
            f"{out}: {len(rows)} linears quantised, the decoder's at {chosen.bits} bits. "
            f"Serve it: vllm serve {out} --quantization vlmq"
        )
