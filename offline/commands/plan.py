"""`vlmq plan`: what a run would do and need, before it begins."""

import json
from typing import Annotated, Any

import typer

from vlmq_vllm.offline.commands.options import Device, Json, Model, Recipe, given, takes
from vlmq_vllm.offline.settings.quantize import Settings


@takes(Settings)
def plan(
    context: typer.Context,
    model: Model,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a sample, if known; default: --max-tokens.")] = None,
    device: Device = "",
    recipe: Recipe = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Show sizes, memory and tensor-parallel cuts of a run on MODEL, from its headers and config alone.

    Peak memory is a forecast, within 20 %, for methods rtn, gptq and vlmq with no token weights or VLMQ's; for all
    others it is a bound and said to be one ("at most", in JSON peak_is_bound).
    """
    from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from

    chosen = settings_from(read_recipe(recipe) if recipe else {}, given(context))
    from vlmq_vllm.offline.machine.device import default_device
    from vlmq_vllm.offline.plan.make import make_plan
    from vlmq_vllm.offline.plan.show import show

    found = make_plan(model, chosen, default_device(device), tokens)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found)
