"""`vlmq info`: what a checkpoint holds."""

import json
from typing import TYPE_CHECKING

import typer

from vlmq_vllm.offline.commands.options import Json, Quantized

if TYPE_CHECKING:
    from vlmq_vllm.offline.checkpoint.info import Info


def info(folder: Quantized, as_json: Json = False) -> None:
    """Show what FOLDER holds: formats, size, the run that made it, and how to serve it. Reads no weights."""
    from vlmq_vllm.offline.checkpoint.info import info as read

    found = read(folder)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        _show(found)


def _show(found: "Info") -> None:
    from vlmq_vllm.offline.commands.tables import show, table_of

    lines = []
    for kind in found.kinds:
        group = "row" if kind.format.group_size == -1 else str(kind.format.group_size)
        grid = "symmetric" if kind.format.symmetric else "asymmetric"
        bits = str(kind.format.bits), group, grid, str(kind.count), f"{kind.bits:.3f}"
        lines.append((kind.pattern, kind.component, *bits))
    headings = ("quantised linears", "component", "bits", "group", "grid", "count", "bits per weight")
    show(table_of(lines, headings), table_of(_rows(found)))


def _rows(found: "Info") -> list[tuple[str, str]]:
    settings = found.tool.get("settings") or {}
    return [
        ("model", f"{found.model_type}, {found.parameters:,} parameters, {found.quantized:,} of them quantised"),
        ("size", f"{found.bytes / 1e6:.1f} MB of weights"),
        ("bits per weight", f"{found.bits_per_weight:.3f} quantised, {found.bits_per_parameter:.3f} over all"),
        ("inputs", f"{found.activation_bits} bits{' (rounded token by token)' if found.activation_bits != 16 else ''}"),
        ("made by", f"{found.tool.get('name', 'unknown')} {found.tool.get('version', '')}".strip()),
        ("settings", ", ".join(f"{name} {value}" for name, value in settings.items()) or "unknown"),
        ("calibration", "unknown" if found.samples is None else f"{found.samples} samples"),
        ("serve it", found.serve),
    ]
