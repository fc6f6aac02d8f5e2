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
    from vlmq_vllm.offline.commands.tables import show, table_of

    lines = [(p.name, p.found or "not installed", p.supported, "PROBLEM" if p.problem else "") for p in found.packages]
    said = [f"problem: {problem}" for problem in found.problems] or ["quantising and serving can work here"]
    show(table_of([*lines, *_rows(found)]), *said)


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
