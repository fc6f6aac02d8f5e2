"""The `vlmq` command. Heavy modules are imported by the command that needs them, so that `--help` is quick."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Quantise vision-language models to 2, 3 or 4 bits and check the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
Model = Annotated[str, typer.Argument(help="Folder of the 16-bit model, or its name on the Hugging Face hub.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")]
Data = Annotated[Path | None, typer.Option(help="Calibration data: JSONL, one chat with images per line.")]


@app.command()
def quantize(
    model: Model,
    out: Out,
    data: Data = None,
    bits: Annotated[int, typer.Option(help="2, 3 or 4.")] = 3,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale, usually 32, 64 or 128; -1: all.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Without zero points, or with one per group.")] = False,
    method: Annotated[str, typer.Option(help="vlmq, gptq or rtn.")] = "vlmq",
    samples: Annotated[int, typer.Option(help="Calibration samples to use.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer samples.")] = 2048,
    saliency_power: Annotated[int, typer.Option(help="p in the token weight g^p: 2 or 1.")] = 2,
    act_order: Annotated[str, typer.Option(help="static or none.")] = "static",
    grid: Annotated[str, typer.Option(help="mse or minmax.")] = "mse",
    damp: Annotated[float, typer.Option(help="Relative damping of the second moments.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Decides which samples are drawn.")] = 42,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")] = "",
) -> None:
    """Quantise MODEL's language model and write a checkpoint that vLLM serves."""
    from vlmq_vllm.offline.settings import Settings

    settings = Settings(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        samples=samples,
        max_tokens=max_tokens,
        saliency_power=saliency_power,
        act_order=act_order,
        grid=grid,
        damp=damp,
        seed=seed,
    )
    import torch
    from rich.console import Console

    from vlmq_vllm.offline import quantize as walk
    from vlmq_vllm.offline.progress import Progress

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = walk.quantize(model, out, data, settings, device, Progress(Console(stderr=True)))
    typer.echo(f"{out}: {len(rows)} linears at {bits} bits. Serve it: vllm serve {out} --quantization vlmq")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder of a quantised checkpoint.")]) -> None:
    """Check FOLDER: hashes, schema, and that every number is finite."""
    from collections import Counter

    from vlmq_vllm.offline.verify import verify as check

    verdict = check(folder)
    widths = Counter(module.format.bits for module in verdict.modules.values())
    parts = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(widths.items()))
    typer.echo(
        f"{folder} is sound: {verdict.files} files, {verdict.bytes / 1e6:.1f} MB, {verdict.tensors} tensors; {parts}"
    )


@app.command()
def dequantize(folder: Annotated[Path, typer.Argument(help="Folder of a quantised checkpoint.")], out: Out) -> None:
    """Write FOLDER's weights back to 16 bits, for software that does not know vlmq."""
    from vlmq_vllm.offline.dequantize import dequantize as write

    write(folder, out)
    typer.echo(f"{out}: the same model, no longer packed")


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 2."""
    from vlmq_vllm.errors import CheckpointError, QuantizeError

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that half-written output goes
    try:
        app()
    except (QuantizeError, CheckpointError, OSError) as error:
        print(f"vlmq: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
