"""`vlmq quantize`: the options of a run, and the run."""

from typing import Annotated

import typer

from vlmq_vllm.offline.commands.arguments import Data, Model, Out


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
