"""`vlmq plan`: what a run would do and need, before it begins."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmq_vllm.offline.commands.options import Device, Json, Model, Recipe, given, takes
from vlmq_vllm.offline.settings.quantize import Settings

if TYPE_CHECKING:
    from vlmq_vllm.offline.plan.make import Plan


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

    Peak memory is a forecast, within 20 %, for methods rtn, gptq and vlmq with no token weights or VLMQ's, unless the
    base is gptaq; for all others it is a bound and said to be one ("at most", in JSON peak_is_bound).
    """
    from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from

    chosen = settings_from(read_recipe(recipe) if recipe else {}, given(context))
    from vlmq_vllm.offline.machine.device import default_device
    from vlmq_vllm.offline.plan.make import make_plan

    found = make_plan(model, chosen, default_device(device), tokens)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        _show(found)


def _show(found: "Plan") -> None:
    from vlmq_vllm.offline.commands.tables import show, table_of

    parts = ("component", "dtype", "parameters", "size", "quantised", "bits per weight")
    linears = ("quantised linears", "count", "rows x columns", "vLLM's layer", "tensor parallel")
    show(
        table_of(_parts(found), parts, right=("parameters",)),
        table_of(_linears(found), linears),
        table_of(_sizes(found)),
        *(f"warning: {warning}" for warning in found.warnings),
    )


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _parts(found: "Plan") -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for part in found.parts:
        bits = "" if part.bits is None else f"{part.bits:.2f}"
        share = "" if part.bits is None else f"{part.quantized / part.parameters:.1%}"
        lines.append((part.component, part.dtype, f"{part.parameters:,}", _size(part.bytes), share, bits))
    return lines


def _linears(found: "Plan") -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for linear in found.linears:
        last = linear.columns % linear.format.width(linear.columns)
        fits = ", ".join(str(count) for count, reason in linear.cuts.items() if reason is None) or "none"
        layer = "takes none" if linear.refused else linear.layer.removesuffix("Linear")
        shape = f"{linear.rows} x {linear.columns}{f', last group {last}' if last else ''}"
        lines.append((linear.pattern, str(linear.count), shape, layer, fits))
    return lines


def _sizes(found: "Plan") -> list[tuple[str, str]]:
    from vlmq_vllm.offline.plan.memory import LIBRARIES

    peak, most = found.peak, "at most " if found.peak_is_bound else ""
    whole = 8 * found.checkpoint_bytes / found.parameters
    lines = [
        ("checkpoint", f"{_size(found.checkpoint_bytes)}, the source has {_size(found.source_bytes)}"),
        ("bits per weight", f"{found.bits_per_weight:.3f} quantised, {whole:.3f} over the whole model"),
    ]
    if found.load.samples:
        tokens = f"{found.load.samples} samples of at most {found.load.tokens} tokens"
        lines.append(("calibration", f"{tokens}, all of them taken for vision tokens"))
    lines.append(("peak memory", f"{most}{_size(found.peak_memory_bytes)} ({_size(LIBRARIES)} of it libraries)"))
    if found.peak_device_bytes is not None:
        lines.append(("peak on the GPU", f"{most}{_size(found.peak_device_bytes)}"))
    largest = sorted((peak.host | peak.device).items(), key=lambda item: -item[1])
    terms = ", ".join(f"{name} {_size(count)}" for name, count in largest if count)
    return [*lines, ("greatest phase", f"{peak.name}: {terms}")]
