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
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
