"""`vlmq doctor`: whether quantising and serving can work here."""

import json

import typer

from vlmq_vllm.offline.commands.options import Json
from vlmq_vllm.offline.machine.doctor import Diagnosis, diagnose

REFUSED = 3


def doctor(as_json: Json = False) -> None:
    """Check versions, the plugin, devices, memory and disk; exit code 3 if something stands in the way."""
    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(REFUSED)


def _show(found: Diagnosis) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, show_edge=False)
    for package in found.packages:
        verdict = "" if package.problem is None else "PROBLEM"
        table.add_row(package.name, package.found or "not installed", package.supported, verdict)
    for name, value in _rows(found):
        table.add_row(name, value, "", "")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for problem in found.problems:
        console.print(f"problem: {problem}")
    if not found.problems:
        console.print("quantising and serving can work here")


def _rows(found: Diagnosis) -> list[tuple[str, str]]:
    plugin = {None: "vLLM is not installed", True: "registered", False: "not registered"}[found.plugin]
    devices = [f"{d['name']}, {'.'.join(map(str, d['capability']))}, {d['memory'] / 1e9:.0f} GB" for d in found.devices]
    return [
        ("plugin", plugin),
        ("CUDA devices", "; ".join(devices) or "none"),
        ("processor", f"{found.cores} cores, {', '.join(found.processor) or 'instruction sets unknown'}"),
        ("free memory", "unknown" if found.memory is None else f"{found.memory / 1e9:.1f} GB"),
        ("free disk here", f"{found.disk / 1e9:.1f} GB"),
    ]
