"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder of the 16-bit model, or its name on the Hugging Face hub.")]
Quantized = Annotated[Path, typer.Argument(help="Folder of a quantised checkpoint.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")]
Data = Annotated[
    str | None, typer.Option(help="Calibration data: JSONL of chats, a folder of pictures with captions, or hf:NAME.")
]
Bits = Annotated[int, typer.Option(help="2, 3, 4 or 8.")]
GroupSize = Annotated[int, typer.Option(help="Columns that share a scale, usually 32, 64 or 128; -1: all.")]
Symmetric = Annotated[bool, typer.Option(help="Without zero points, or with one per group.")]
VisionBits = Annotated[int, typer.Option(help="Of the vision tower's blocks: 2, 3, 4, 8, or 16 as they are.")]
ConnectorBits = Annotated[int, typer.Option(help="Of the connector: 2, 3, 4, 8, or 16 as it is.")]
ActivationBits = Annotated[
    int,
    typer.Option(help="8: round inputs of quantised layers per token when served (weights of 4 or 8 bits); 16: not."),
]
Method = Annotated[str, typer.Option(help="vlmq, gptq, awq, qvlm or rtn.")]
Saliency = Annotated[
    str,
    typer.Option(
        help="Token weights: none, vlmq, modality (MBQ) or qig; gptq takes all, awq all but vlmq. Default: none, for "
        "method vlmq its own."
    ),
]
Base = Annotated[
    str, typer.Option(help="gptq, gptaq or aligned; default: gptq for method gptq, what measured best for vlmq.")
]
Recipe = Annotated[
    Path | None, typer.Option(help="YAML with settings of vlmq quantize; options on the command line win.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def given(context: typer.Context) -> dict:
    """The options that stand on the command line; the others leave the word to a recipe and to measured defaults."""
    return {n: v for n, v in context.params.items() if context.get_parameter_source(n).name == "COMMANDLINE"}
