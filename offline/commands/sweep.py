"""`vlmq sweep`: which parts of a model bear fewer bits."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmq_vllm.offline.commands.options import Device, Json, Model, say, settings_of, takes
from vlmq_vllm.offline.commands.stopping import stop_on_sigterm
from vlmq_vllm.offline.settings.sweep import StudySettings


@takes(StudySettings)
def sweep(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Held-out chats that end in a reference answer, as JSONL, folder or hf:NAME.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study.")],
    calibration: Annotated[
        str | None, typer.Option(help="Calibration data, none of it held out; only rtn alone goes without.")
    ] = None,
    device: Device = "",
    resume: Annotated[bool, typer.Option(help="Go on with a study; may ask for more bits, methods and parts.")] = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Give parts of MODEL fewer bits, one at a time and all together, and report what that costs.

    Writes OUT/report.md, results.csv, pareto.csv and pareto.png; with --budget also recipe.yaml, for vlmq quantize
    --recipe. Lists are written with commas.
    """
    from vlmq_vllm.offline.machine.device import default_device
    from vlmq_vllm.offline.machine.malloc import give_back_large_blocks

    chosen = settings_of(StudySettings, settings)
    from vlmq_vllm.offline.sweep.markdown import counted
    from vlmq_vllm.offline.sweep.run import sweep as run

    give_back_large_blocks()
    found = run(model, data, calibration, out, chosen, default_device(device), say, resume, stop_on_sigterm())
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    rows, parts = counted(len(found["rows"]), "configuration"), counted(len(found["parts"]), "part")
    typer.echo(f"{out}/report.md: {rows} of {parts}")
    if "mixture" in found:
        row = found["mixture"]["row"]
        given = f"--data {calibration} " if calibration else ""
        typer.echo(
            f"{out}/recipe.yaml: {row['bits_per_weight']:.3f} bits per weight, KL {row['kl']:.3g}. "
            f"Use it: vlmq quantize {model} -o OUT {given}--recipe {out}/recipe.yaml"
        )
