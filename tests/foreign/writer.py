"""What the writers share: their command line, text to calibrate with, and the weights that are written as truth.

A writer is one process, `python write_PEER.py BASE OUT CASES`, in the environment of its peer: it quantises the model
of the folder BASE once for every entry of the JSON object CASES, name to settings, into OUT/name. Needs no more than
what every peer's environment has.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

TRUTH = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")  # names of the modules in BASE
WORDS = ("red", "blue", "sign", "picture", "number", "word", "two", "what", "colour", "video")


def run(write: Callable[..., None], dequantize: Callable[[Path], dict]) -> None:
    """Call write(base, out, **settings) for every case, then dequantize(out) for OUT/name/expected.safetensors.

    `dequantize` gives weights [O, I] float32 by their module's name in the peer's file. A case that fails is reported
    and the others go on; then the exit status is 1.
    """
    base, out, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    failed = []
    for name, settings in cases.items():
        try:
            write(base, str(out / name), **settings)
            save_file(dequantize(out / name), out / name / "expected.safetensors")
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise SystemExit(f"not written: {', '.join(failed)}")


def texts(count: int) -> list[str]:
    """Different texts of 24 words; quality is of no interest here, the files' layout is."""
    return [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 25)) for n in range(1, count + 1)]


def in_memory(name: str) -> str:
    """The module of BASE called `name` as transformers names it."""
    return name.replace("model.layers.", "model.language_model.layers.")
