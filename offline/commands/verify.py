"""`vlmq verify`: whether a checkpoint is whole."""

import typer

from vlmq_vllm.offline.commands.arguments import Quantized


def verify(folder: Quantized) -> None:
    """Check FOLDER: hashes, schema, and that every number is finite."""
    from collections import Counter

    from vlmq_vllm.offline.verify import verify as check

    verdict = check(folder)
    widths = Counter(module.format.bits for module in verdict.modules.values())
    parts = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(widths.items()))
    typer.echo(
        f"{folder} is sound: {verdict.files} files, {verdict.bytes / 1e6:.1f} MB, {verdict.tensors} tensors; {parts}"
    )
