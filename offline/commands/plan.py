"""`vlmq plan`: what a run would do and need, before it begins."""

import json
from typing import Annotated

import typer

from vlmq_vllm.offline.commands.options import (
    ActivationBits,
    Base,
    Bits,
    ConnectorBits,
    GroupSize,
    Json,
    Method,
    Model,
    Recipe,
    Saliency,
    Symmetric,
    VisionBits,
    given,
)


def plan(
    context: typer.Context,
    model: Model,
    bits: Bits = 3,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    vision_bits: VisionBits = 16,
    connector_bits: ConnectorBits = 16,
    activation_bits: ActivationBits = 16,
    method: Method = "vlmq",
    saliency: Saliency = "",
    base: Base = "",
    saliency_scope: Annotated[
        str, typer.Option(help="attention, or all for gate, up and down too; default: by width.")
    ] = "",
    samples: Annotated[int, typer.Option(help="Calibration samples to use.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer samples.")] = 2048,
    max_pixels: Annotated[int, typer.Option(help="Shrink larger pictures; 0: leave them.")] = 0,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a sample, if known; default: --max-tokens.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = "",
    force: Annotated[bool, typer.Option(help="Plan also layers that vLLM would not load.")] = False,
    recipe: Recipe = None,
    as_json: Json = False,
) -> None:
    """Show sizes, memory and tensor-parallel cuts of a run on MODEL, from its headers and config alone."""
    from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from

    settings = settings_from(read_recipe(recipe) if recipe else {}, given(context))
    import torch

    from vlmq_vllm.offline.plan.plan import plan as make
    from vlmq_vllm.offline.plan.show import show

    found = make(model, settings, device or ("cuda" if torch.cuda.is_available() else "cpu"), tokens)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found)
