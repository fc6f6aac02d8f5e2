"""Holds what the runners of this folder share: their arguments, the samples, a clock, and the JSON line they print.

Every runner is one process: `SCRIPT MODEL DATA OUT --bits 4 --samples 128` quantises MODEL with the chats of DATA into
OUT and prints one line that begins with MARK. It runs inside the environment of its tool, so this file needs no more
than what all of them have: torch, transformers, safetensors, pillow.
"""

import argparse
import json
import os
import resource
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import monotonic, process_time

MARK = '{"tool": '
BEGAN = monotonic()  # this file is imported before anything heavy


def arguments(**extra: str) -> argparse.Namespace:
    """The command line; `extra` are further text options with their defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="JSONL of chats, pictures as paths beside it")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    for name, default in extra.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


def inputs(data: Path, processor, limit: int) -> list[dict]:
    """The first `limit` chats as the processor makes them: one sample each, no padding, answers included."""
    from PIL import Image

    found = []
    for line in data.read_text().splitlines()[:limit]:
        messages = json.loads(line)["messages"]
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        images = [Image.open(data.parent / part["image"]).convert("RGB") for part in parts if part["type"] == "image"]
        text = processor.apply_chat_template(messages, tokenize=False)
        found.append(dict(processor(text=[text], images=images or None, return_tensors="pt")))
    return found


class Clock:
    """Seconds of the named parts of a run, by the wall and of all threads; "imports" is what came before them."""

    def __init__(self) -> None:
        self.seconds = {"imports": round(monotonic() - BEGAN, 2)}
        self.cpu_seconds = {"imports": round(process_time(), 2)}
        self.import_rss = _peak_rss()

    @contextmanager
    def __call__(self, part: str):
        began, worked = monotonic(), process_time()
        yield
        self.seconds[part] = round(monotonic() - began, 2)
        self.cpu_seconds[part] = round(process_time() - worked, 2)


def loaded(args: argparse.Namespace, clock: Clock) -> tuple:
    """The Qwen2-VL model in its own dtype, its processor, and the samples."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    with clock("load"):
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype="auto")
        processor = AutoProcessor.from_pretrained(args.model)
    with clock("prepare"):
        samples = inputs(args.data, processor, args.samples)
    return model, processor, samples


def report(tool: str, args: argparse.Namespace, clock: Clock, packages: tuple[str, ...], settings: dict) -> None:
    """Print the JSON line. `settings` says what the tool was told beyond the arguments, and which defaults matter."""
    import torch

    line = {
        "tool": tool,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "peak_rss_bytes": _peak_rss(),
        "import_rss_bytes": clock.import_rss,
        "linears": _linears(args.out),
        "samples": args.samples,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "settings": {"bits": args.bits, "group_size": args.group_size, "symmetric": args.symmetric} | settings,
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }
    print(f"\n{json.dumps(line)}", flush=True)  # a progress bar may have left its line open


def _peak_rss() -> int:
    """Bytes; of this process or of the largest child it waited for, whichever is more (Linux counts in KiB)."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _linears(out: Path) -> int:
    """How many linears the written checkpoint holds in packed form, in any of the tools' formats."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return sum(name.endswith((".weight_packed", ".qweight")) for name in names)
