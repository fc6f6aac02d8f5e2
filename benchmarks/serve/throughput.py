"""Measures serving at 16, 4, 3 and 2 bits beside vLLM's own 4-bit kernels: requests/s, latencies, memory.

    # the demo model, on a CPU
    python benchmarks/serve/throughput.py --serve-args="--enforce-eager --max-num-seqs 8" --out demo.jsonl
    # wide layers, on a CPU
    python benchmarks/serve/throughput.py --shape 7b-layer --layers 2 --variants bf16 w4 w3 w2 vllm-w4
    # on a GPU
    python benchmarks/serve/throughput.py --shape 7b --rounds 3 --requests 256 --concurrency 32 --out 7b.jsonl

Every variant gets a real `vllm serve` and the load of `vllm bench serve`, one after the other, --rounds times in turn.
A variant that fails is listed with the reason and the others go on; those that need a GPU are skipped where there is
none. FILE gets a JSON line for every run as it ends, and its neighbour with the suffix .md the tables
(`throughput_report.py`). What is served is made by `checkpoints.py`: 7b takes 24 GB of disk while it runs.
"""

import argparse
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path

from benchmarks.journal import Journal
from benchmarks.serve.checkpoints import Models, size
from benchmarks.serve.machine import machine, without_folders
from benchmarks.serve.throughput_report import report
from benchmarks.serve.variants import VARIANTS, Bench, Load
from benchmarks.shapes import SHAPES
from vlmq_vllm.format import WeightFormat

DEMO = Path(__file__).absolute().parents[2] / "examples/demo_vlm/model"


def compare(bench: Bench, models: Models, names: list[str], rounds: int, journal: Journal) -> None:
    """All runs; one that failed is not tried again."""
    failed = set()
    for number in range(1, rounds + 1):
        for name in names:
            if name in failed:
                continue
            try:
                folder = models.folder(VARIANTS[name].bits, VARIANTS[name].stock)
                found = bench.run(name, folder)
            except (RuntimeError, OSError, SafetensorError, psutil.Error) as error:
                failed.add(name)
                journal.add("failed", variant=name, round=number, reason=without_folders(str(error), bench.work))
            else:
                journal.add("run", variant=name, round=number, file_bytes=size(folder), **found)
            journal.tables()  # so that there are some, should this process be ended from outside
            print({key: journal.lines[-1].get(key) for key in ("kind", "variant", "round", "reason")}, file=sys.stderr)


def chosen(names: list[str], gpu: bool, journal: Journal) -> list[str]:
    """Those of the variants that can be served here; the journal is told of the others."""
    for name in names:
        if VARIANTS[name].gpu and not gpu:
            journal.add("skipped", variant=name, reason="no GPU: torch finds no CUDA device")
    return [name for name in names if gpu or not VARIANTS[name].gpu]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = made.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="folder of a 16-bit model; default: the demo model")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    made.add_argument("--layers", type=positive, metavar="N", help="decoder layers of --shape; default: all it has")
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    made.add_argument("--group-size", type=int, default=128)
    made.add_argument("--asymmetric", action="store_true", help="with zero points")
    made.add_argument("--rounds", type=positive, default=1, help="how often each variant gets its turn")
    made.add_argument("--requests", type=positive, default=64, help="in each run")
    made.add_argument("--concurrency", type=positive, help="requests at once; default: 8, with --request-rate no limit")
    made.add_argument("--request-rate", type=float, default=float("inf"), metavar="R", help="per second; default: inf")
    made.add_argument("--image-size", type=pixels, default=(112, 112), metavar="WxH", help="pixels; default: 112x112")
    made.add_argument("--input-tokens", type=positive, default=64, help="of text beside the picture")
    made.add_argument("--output-tokens", type=positive, default=32)
    made.add_argument("--seed", type=int, default=0, help="of the requests")
    made.add_argument("--serve-args", type=shlex.split, default=[], metavar="ARGS", help="more options of vllm serve")
    made.add_argument("--patience", type=float, default=900, help="seconds that a server may take to start")
    made.add_argument("--limit", type=float, default=1800, help="seconds that the load of one run may take")
    made.add_argument("--work", type=Path, help="folder for checkpoints, which go away again; default: temporary")
    made.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; tables beside it with the suffix .md")
    return made


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too little; at least 1 is needed")
    return int(text)


def pixels(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive(width), positive(height or width)


def main() -> None:
    made = parser()
    args = made.parse_args()
    if args.layers and not args.shape:
        made.error("--layers goes with --shape; a model has the layers that it has")
    if args.model and not (args.model / "config.json").is_file():
        made.error(f"--model {args.model} has no config.json; give the folder of a 16-bit model")
    for folder in (args.work, args.out and args.out.absolute().parent):
        if folder and not folder.is_dir():
            made.error(f"{folder} is no folder; create it or choose another one")
    try:
        formats = [WeightFormat(bits, args.group_size, not args.asymmetric) for bits in (4, 3, 2)]
    except ValueError as error:
        made.error(f"--group-size: {error}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # so that the server is stopped then, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    concurrency = args.concurrency or (8 if args.request_rate == float("inf") else None)
    load = Load(
        args.requests,
        concurrency,
        args.request_rate,
        args.image_size,
        args.input_tokens,
        args.output_tokens,
        args.seed,
    )
    model = None if args.shape else (args.model or DEMO).absolute()
    gpu = torch.cuda.is_available()
    journal = Journal(args.out, report)
    journal.add("machine", **machine(model, args.shape, args.layers, formats[0], load, gpu))
    names = chosen(args.variants, gpu, journal)
    with tempfile.TemporaryDirectory(prefix="vlmq-serve-", dir=args.work) as folder:
        work = Path(folder).absolute()
        bench = Bench(load, tuple(args.serve_args), work, args.patience, args.limit)
        compare(bench, Models(work, model, args.shape, args.layers, formats[0]), names, args.rounds, journal)
    print(journal.tables())
    failed = sorted({line["variant"] for line in journal.lines if line["kind"] == "failed"})
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
