"""Adds the trained difference to the base model: `python benchmarks/real_lm/merge.py BASE ADAPTER OUT`.

The result is an ordinary Qwen2-VL folder in bfloat16, with the base's tokenizer and processor.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/demo_vlm"))
from architecture import save  # noqa: E402, found beside the demo


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write `base` with `adapter` added to its weights into `out`. The sum is taken in float32 and rounded once."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    save(PeftModel.from_pretrained(model, adapter).merge_and_unload(), AutoProcessor.from_pretrained(base), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    merge(args.base, args.adapter, args.out)
