"""`vlmq sweep`: which parts of a model bear fewer bits."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmq_vllm.offline.commands.options import GroupSize, Json, Model, Symmetric
from vlmq_vllm.offline.commands.stopping import STOPPED, stop_on_sigterm


def sweep(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Held-out chats that end in a reference answer, as JSONL, folder or hf:NAME.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study.")],
    calibration: Annotated[
        str | None, typer.Option(help="Calibration data, none of it held out; only rtn alone goes without.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Widths besides 16, of 2, 3, 4 and 8.")] = "2,3,4",
    methods: Annotated[str, typer.Option(help="Of rtn, awq and gptq; each is studied.")] = "rtn,gptq",
    by: Annotated[str, typer.Option(help="What a part is: component, third, kind, layer or module.")] = "component",
    design: Annotated[
        str, typer.Option(help="one part at a time; grid: all combinations; random: some of them.")
    ] = "one",
    runs: Annotated[int, typer.Option(help="Configurations of a random design; the most that a grid may have.")] = 128,
    components: Annotated[
        str,
        typer.Option(
            help="Of vision, connector and language; default: all by component, else language; --resume: as before."
        ),
    ] = "",
    samples: Annotated[int | None, typer.Option(help="Held-out chats to use, drawn by --seed; default: all.")] = None,
    calibration_samples: Annotated[int, typer.Option(help="Calibration chats to use.")] = 128,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Also find widths of modules for so many bits per weight (below 16), scales included, and a recipe."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer chats.")] = 2048,
    max_pixels: Annotated[int, typer.Option(help="Shrink larger calibration pictures; 0: leave them.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the judged model.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")] = "",
    seed: Annotated[int, typer.Option(help="Decides drawn chats, random designs and the forest.")] = 42,
    resume: Annotated[
        bool, typer.Option(help="Go on with a study; may ask for more bits, methods, parts and designs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Give parts of MODEL fewer bits, one at a time or in combinations, and report what that costs.

    Writes OUT/report.md, results.csv, pareto.csv and pareto.png; with --budget also recipe.yaml, for vlmq quantize
    --recipe. Lists are written with commas.
    """
    from vlmq_vllm.errors import QuantizeError, StoppedError
    from vlmq_vllm.offline.machine.malloc import give_back_large_blocks
    from vlmq_vllm.offline.settings.sweep import StudySettings

    try:
        widths = tuple(map(int, _list(bits)))
    except ValueError:
        raise QuantizeError(f"bits is {bits!r}; give numbers with commas between them, such as 2,3,4") from None
    settings = StudySettings(
        bits=widths,
        methods=_list(methods),
        by=by,
        design=design,
        runs=runs,
        components=_list(components) or None,
        group_size=group_size,
        symmetric=symmetric,
        budget=budget,
        samples=samples,
        calibration_samples=calibration_samples,
        max_tokens=max_tokens,
        max_pixels=max_pixels,
        dtype=dtype,
        seed=seed,
    )
    import torch

    from vlmq_vllm.offline.sweep.markdown import counted
    from vlmq_vllm.offline.sweep.run import sweep as run

    def say(line: str) -> None:
        typer.echo(f"vlmq: {line}", err=True)

    give_back_large_blocks()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = run(model, data, calibration, out, settings, device, say, resume, stop_on_sigterm())
    except StoppedError as stopped:
        typer.echo(f"vlmq: {stopped}", err=True)
        sys.exit(STOPPED)
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


def _list(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^,\s]+", text))
