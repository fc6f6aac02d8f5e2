"""`vlmq export` and `vlmq dequantize`: the same weights for other software."""

from typing import Annotated

import typer

from vlmq_vllm.offline.commands.options import Out, Quantized

Format = Annotated[str, typer.Option("--format", help="compressed-tensors or gptq.")]


def export(folder: Quantized, out: Out, target: Format) -> None:
    """Rewrite FOLDER for software that reads compressed-tensors or GPTQ, without quantising again."""
    from vlmq_vllm.offline.checkpoint.export.export import export as write

    note = write(folder, out, target)
    typer.echo(f"{out}: the same codes as {target}" + (f"; {note}" if note else ""))


def dequantize(folder: Quantized, out: Out) -> None:
    """Write the weights of FOLDER, ours or one of GPTQModel, AutoRound or llm-compressor, back to 16 bits."""
    from vlmq_vllm.offline.checkpoint.dequantize import dequantize as write

    write(folder, out)
    typer.echo(f"{out}: the same model, no longer packed")
