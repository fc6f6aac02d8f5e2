"""`vlmq quantize`: the options of a run, and the run."""

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from vlmq_vllm.offline.commands.options import (
    ActivationBits,
    Base,
    Bits,
    ConnectorBits,
    Data,
    GroupSize,
    Json,
    Method,
    Model,
    Out,
    Recipe,
    Saliency,
    Symmetric,
    VisionBits,
    given,
)
from vlmq_vllm.offline.commands.stopping import STOPPED, stop_on_sigterm

BEST = "default: what measured best for the width."


def quantize(
    context: typer.Context,
    model: Model,
    out: Out,
    data: Data = None,
    bits: Bits = 3,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    vision_bits: VisionBits = 16,
    connector_bits: ConnectorBits = 16,
    activation_bits: ActivationBits = 16,
    method: Method = "vlmq",
    saliency: Saliency = "",
    base: Base = "",
    alpha: Annotated[
        float | None, typer.Option(help="Share of the residual that gptaq (0.25) and aligned (1) use.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples to use.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer samples.")] = 2048,
    max_pixels: Annotated[int, typer.Option(help="Shrink larger pictures; 0: leave them.")] = 0,
    scale_loss: Annotated[str, typer.Option(help="mae or mse, of the search for AWQ's channel scales.")] = "mae",
    saliency_power: Annotated[int, typer.Option(help="p in the token weight g^p: 2 or 1.")] = 2,
    saliency_scope: Annotated[str, typer.Option(help=f"attention, or all for gate, up and down too; {BEST}")] = "",
    saliency_fallback: Annotated[str, typer.Option(help="Without a signal: ones or rtn.")] = "ones",
    saliency_floor: Annotated[float, typer.Option(help="Least g / mean g.")] = 0.0,
    saliency_cap: Annotated[float, typer.Option(help="Greatest g / mean g; 0: none.")] = 0.0,
    act_order: Annotated[str, typer.Option(help=f"static or none; {BEST}")] = "",
    grid: Annotated[str, typer.Option(help=f"mse, mse-h or minmax; {BEST}")] = "",
    damp: Annotated[float | None, typer.Option(help=f"Relative damping of the second moments; {BEST}")] = None,
    seed: Annotated[int, typer.Option(help="Decides which samples are drawn.")] = 42,
    force: Annotated[bool, typer.Option(help="Quantise also layers that vLLM would not load.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")] = "",
    recipe: Recipe = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run.")] = False,
    as_json: Json = False,
) -> None:
    """Quantise MODEL and write a checkpoint that vLLM serves."""
    from vlmq_vllm.errors import StoppedError
    from vlmq_vllm.offline.machine.malloc import give_back_large_blocks
    from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from, unread

    options = given(context)
    settings = settings_from(read_recipe(recipe) if recipe else {}, options)
    import torch
    from rich.console import Console

    from vlmq_vllm.offline.machine.progress import Progress
    from vlmq_vllm.offline.run import quantize as run

    give_back_large_blocks()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    first = os.environ.get("RANK", "0") == "0"
    if first and (idle := unread(settings, options)):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        typer.echo(f"vlmq: method {settings.method} makes no use of {named}", err=True)
    progress = Progress(Console(stderr=True)) if first else Progress()
    try:
        rows = run.quantize(model, out, data, settings, device, progress, resume, stop_on_sigterm())
    except StoppedError as stopped:
        if first:
            typer.echo(f"vlmq: {stopped}", err=True)
        sys.exit(STOPPED)
    if first and as_json:
        modules = [asdict(row) for row in rows]
        typer.echo(json.dumps({"out": str(out), "settings": settings.to_dict(), "modules": modules}, indent=2))
    elif first:
        typer.echo(
            f"{out}: {len(rows)} linears quantised, the decoder's at {settings.bits} bits. "
            f"Serve it: vllm serve {out} --quantization vlmq"
        )
