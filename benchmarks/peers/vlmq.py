"""Runs `vlmq quantize` with the same clock as its peers: the imports first, then the command itself in this process.

The command reads, calibrates, solves and writes layer by layer, so "quantise" holds all of it, with load and save.
"""

import sys

from runner import Clock, arguments, report

args = arguments(method="vlmq", device="cpu")

import torch  # noqa: E402, F401, after the clock of runner.py has started
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration  # noqa: E402, F401

from vlmq_vllm.offline.commands.app import main as command  # noqa: E402
from vlmq_vllm.offline.run import quantize  # noqa: E402, F401


def main() -> None:
    clock = Clock()
    options = ["--bits", args.bits, "--group-size", args.group_size, "--samples", args.samples]
    options += ["--method", args.method, "--device", args.device, *(["--symmetric"] if args.symmetric else [])]
    sys.argv = ["vlmq", "quantize", *map(str, [args.model, "-o", args.out, "--data", args.data, *options])]
    with clock("quantise"):
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise
    report(f"vlmq --method {args.method}", args, clock, (), {"method": args.method})


main()
