"""`vlmq dequantize`: the same weights in 16 bits."""

import typer

from vlmq_vllm.offline.commands.options import Out, Quantized


def dequantize(folder: Quantized, out: Out) -> None:
    """Write FOLDER's weights back to 16 bits, for software that does not know vlmq."""
    from vlmq_vllm.offline.checkpoint.dequantize import dequantize as write

    write(folder, out)
    typer.echo(f"{out}: the same model, no longer packed")
