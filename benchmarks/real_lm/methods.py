"""Measures this project's methods on the real language model: `python benchmarks/real_lm/methods.py MODEL CHATS`.

Every method gets the same chats, groups of 64 and one thread; a seed decides which chats are drawn. `vlmq
quantize` runs in a process of its own, whose processor time and peak memory are taken; its checkpoint, dequantised,
goes to `judge.py`. A line for each model is added to a JSONL file, which a later run completes; the table is printed.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path
sys.path.insert(0, str(Path(__file__).absolute().parents[2] / "examples/demo_vlm"))
from judge import Judge
from rows import Rows, differences, table

from data import write
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

CHATS, POOL = 128, 256  # of a run; pictures that are drawn from
GROUP_SIZE = 64
QEP = {"method": "gptq", "base": "qep"}
REFINED = {"refine": 2}
ROTATED = {"rotate": True}
VLMQ = {"method": "vlmq", "base": "qep", "damp": 0.01, "refine": 0}
PUBLISHED = {"method": "vlmq", "base": "gptaq", "damp": 0.01, "saliency_cap": 0, "saliency_scope": "attention"}
METHODS = {
    "RTN": {"method": "rtn"},
    "AWQ": {"method": "awq"},
    "GPTQ": {"method": "gptq"},
    "GPTAQ": {"method": "gptq", "base": "gptaq"},
    "QEP": QEP,
    "GPTQ, refined": {"method": "gptq"} | REFINED,
    "QEP, refined": QEP | REFINED,
    "QEP, rotated": QEP | ROTATED,
    "QEP, rotated, refined": QEP | ROTATED | REFINED,
    "VLMQ (default)": {"method": "vlmq"},
    "VLMQ (default), rotated": {"method": "vlmq"} | ROTATED,
    "QEP, alpha 0.5": QEP | {"alpha": 0.5},
    "QEP, alpha 0.25": QEP | {"alpha": 0.25},
    "VLMQ on GPTAQ, as published": PUBLISHED,
    "VLMQ on QEP, attention, not cut": VLMQ | {"saliency_scope": "attention", "saliency_cap": 0},
    "VLMQ on QEP, all, not cut": VLMQ | {"saliency_scope": "all", "saliency_cap": 0},
    "VLMQ on QEP, attention": VLMQ | {"saliency_scope": "attention"},
    "VLMQ on QEP, all": VLMQ | {"saliency_scope": "all"},
    "VLMQ on QEP, attention, refined": VLMQ | {"saliency_scope": "attention"} | REFINED,
    "VLMQ on QEP, all, refined": VLMQ | {"saliency_scope": "all"} | REFINED,
    "VLMQ on QEP, attention, g": VLMQ | {"saliency_scope": "attention", "saliency_power": 1},
    "VLMQ on QEP, all, g": VLMQ | {"saliency_scope": "all", "saliency_power": 1},
}


def quantized(model: Path, data: Path, settings: dict, out: Path) -> dict[str, float]:
    """Run `vlmq quantize`; seconds of processor time and gigabytes at its peak."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "vlmq_vllm.offline", "quantize", model, "-o", out, "--recipe", recipe]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).absolute().parents[2])}
    process = subprocess.Popen([*command, "--data", data], env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)  # of this process alone
    if status:
        sys.exit(f"vlmq quantize ended with {os.waitstatus_to_exitcode(status)}: {settings}")
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss / 1e6}


def measure(judge: Judge, model: Path, data: Path, settings: dict) -> dict[str, float]:
    """Cost and figures of one quantised model."""
    with tempfile.TemporaryDirectory() as folder:
        out, twin = Path(folder) / "out", Path(folder) / "twin"
        cost = quantized(model, data, settings, out)
        dequantize(out, twin)
        return cost | tokens_that_count(out) | judge(twin)


def tokens_that_count(out: Path) -> dict[str, float]:
    """Median and least effective tokens over the linears whose tokens are weighted, where any are."""
    modules = json.loads((out / "vlmq_report.json").read_text())["modules"]
    found = [row["effective_tokens"] for row in modules if row["effective_tokens"] is not None]
    return {"effective_median": statistics.median(found), "effective_least": min(found)} if found else {}


def write_drawn(folder: Path, chats: Path, kind: str, seed: int) -> Path:
    """The CHATS calibration chats of a seed: texts, pictures with a question each, or as many of both. A single picture
    stands among texts, for a vision-language model is not calibrated without any; peers may get "text alone"."""
    texts = (chats / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = {"text alone": 0, "text": 1, "pictures": CHATS, "both": CHATS // 2}[kind]
    numbers = random.Random(seed)
    drawn = write(folder, "calibration", POOL)
    lines = numbers.sample(drawn.read_text().splitlines(), pictures) + numbers.sample(texts, CHATS - pictures)
    drawn.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the measurements of our methods and of the peers share."""
    parser.add_argument("model", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calibration", default="both", choices=("text", "pictures", "both"))
    parser.add_argument("--texts", type=int, default=80, help="at least two")
    parser.add_argument("--pictures", type=int, default=210)
    parser.add_argument("--rows", type=Path, default=Path("real_lm.jsonl"), help="file that is completed")
    parser.add_argument(
        "--against", default="VLMQ (default)", help="method that the others are compared with, in pairs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings for all")
    parser.add_argument("--label", default="", help="added to the methods' names, to tell settings apart")
    args = parser.parse_args()
    rows = Rows(args.rows)
    extra = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    judge = Judge(args.model, args.chats, args.texts, args.pictures)
    for bits, seed, name in itertools.product(args.bits, args.seeds, args.methods):
        about = {"bits": bits, "name": name + args.label, "seed": seed, "calibration": args.calibration}
        about["settings"] = {"bits": bits, "group_size": GROUP_SIZE, "seed": seed} | METHODS[name] | extra
        if rows.has(about) or (name == "RTN" and seed != args.seeds[0]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = write_drawn(Path(folder), args.chats, args.calibration, seed)
            rows.add(about | measure(judge, args.model, data, about["settings"]))
    print(table(rows.all))
    print(differences(rows.all, args.against))


if __name__ == "__main__":
    main()
