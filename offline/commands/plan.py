"""`vlmq plan`: what a run would do and need, before it begins."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vlmq_vllm.offline.commands.arguments import Json, Model


def plan(
    context: typer.Context,
    model: Model,
    bits: Annotated[int, typer.Option(help="2, 3 or 4.")] = 3,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale, usually 32, 64 or 128; -1: all.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Without zero points, or with one per group.")] = False,
    vision_bits: Annotated[int, typer.Option(help="Of the vision tower's blocks: 2, 3, 4, 8, or 16 as they are.")] = 16,
    connector_bits: Annotated[int, typer.Option(help="Of the connector: 2, 3, 4, 8, or 16 as it is.")] = 16,
    method: Annotated[str, typer.Option(help="vlmq, gptq or rtn.")] = "vlmq",
    base: Annotated[str, typer.Option(help="gptq, gptaq or aligned; default: what measured best for the width.")] = "",
    saliency_scope: Annotated[
        str, typer.Option(help="attention, or all for gate, up and down too; default: by width.")
    ] = "",
    samples: Annotated[int, typer.Option(help="Calibration samples to use.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer samples.")] = 2048,
    max_pixels: Annotated[int, typer.Option(help="Shrink larger pictures; 0: leave them.")] = 0,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a sample, if known; default: --max-tokens.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = "",
    force: Annotated[bool, typer.Option(help="Plan also layers that vLLM would not load.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any options of vlmq quantize.")] = None,
    as_json: Json = False,
) -> None:
    """Show sizes, memory and tensor-parallel cuts of a run on MODEL, from its headers and config alone."""
    from vlmq_vllm.offline.settings import read_recipe, settings_from

    given = {n: v for n, v in context.params.items() if context.get_parameter_source(n).name == "COMMANDLINE"}
    settings = settings_from(read_recipe(recipe) if recipe else {}, given)
    import torch

    from vlmq_vllm.offline.plan.report import plan as make
    from vlmq_vllm.offline.plan.table import show

    found = make(model, settings, device or ("cuda" if torch.cuda.is_available() else "cpu"), tokens)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found)
