"""`vlmq verify`: whether a checkpoint is whole."""

import json

import typer

from vlmq_vllm.offline.commands.options import Json, Quantized


def verify(folder: Quantized, as_json: Json = False) -> None:
    """Check FOLDER: hashes, schema, and that every number is finite."""
    from collections import Counter

    from vlmq_vllm.offline.checkpoint.verify import verify as check

    verdict = check(folder)
    widths = Counter(module.format.bits for module in verdict.modules.values())
    if as_json:
        counts = {"files": verdict.files, "bytes": verdict.bytes, "tensors": verdict.tensors}
        counts |= {"activation_bits": verdict.activation_bits}
        linears = {str(bits): count for bits, count in sorted(widths.items())}
        typer.echo(json.dumps({"folder": str(folder), "sound": True} | counts | {"linears_by_bits": linears}, indent=2))
        return
    parts = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(widths.items()))
    if verdict.activation_bits != 16:
        parts += f", inputs at {verdict.activation_bits} bits"
    typer.echo(
        f"{folder} is sound: {verdict.files} files, {verdict.bytes / 1e6:.1f} MB, {verdict.tensors} tensors; {parts}"
    )
