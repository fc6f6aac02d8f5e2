"""Measures the quality of quantisation methods on the demo model, over several seeds.

    python benchmarks/quality/compare_methods.py --bits 2 3 4 --seeds 1 2 3

Every method gets the same chats, the same grid and the same groups; a seed decides which chats of a common pool are
drawn. The judge is the full-precision model on held-out questions: KL divergence of the next token at every token of
the right answer, in nats, over the whole vocabulary; with it negative log-likelihood and exact match. One line per
quantised model goes to a JSONL file, which a later run completes; `--table` writes the means and spreads as markdown.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path
sys.path.insert(0, str(Path(__file__).absolute().parents[2] / "examples/demo_vlm"))

from batches import batch
from data import write
from evaluate import answer, embed, load
from pictures import Picture, ask
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.plan.make import make_plan
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import KEPT, Settings
from vlmq_vllm.offline.settings.recipe import read_recipe

MODEL = Path(__file__).absolute().parents[2] / "examples/demo_vlm/model"
POOL = 2048  # chats from which each seed draws
SAMPLES = 512  # chats of a run, about 29,000 tokens; AWQ's and QIG's papers take 128
GROUPS = {2: 128, 3: -1, 4: -1}  # in groups of 128 this model loses too little at 3 and 4 bits to tell methods apart
PUBLISHED = {"method": "vlmq", "saliency_scope": "attention", "saliency_cap": 0, "damp": 0.01, "refine": 0}
VLMQ = {"method": "vlmq", "base": "qep", "damp": 0.01, "refine": 0}
METHODS = {
    "RTN": {"method": "rtn"},
    "AWQ": {"method": "awq"},
    "MBQ": {"method": "awq", "saliency": "modality"},
    "QIG": {"method": "awq", "saliency": "qig"},
    "Q-VLM": {"method": "qvlm"},
    "GPTQ": {"method": "gptq", "base": "gptq"},
    "MBQ's weights in GPTQ": {"method": "gptq", "base": "gptq", "saliency": "modality"},
    "QIG's weights in GPTQ": {"method": "gptq", "base": "gptq", "saliency": "qig"},
    "GPTAQ": {"method": "gptq", "base": "gptaq"},
    "VLMQ on GPTQ": PUBLISHED | {"base": "gptq"},
    "VLMQ on GPTAQ": PUBLISHED | {"base": "gptaq"},
    "QEP": {"method": "gptq", "base": "qep"},
    "QEP, refined": {"method": "gptq", "base": "qep", "refine": 2},
    "VLMQ on QEP": VLMQ | {"saliency_scope": "attention"},
    "VLMQ on QEP, all linears": VLMQ | {"saliency_scope": "all"},
    "VLMQ (default)": {"method": "vlmq"},
}


class Judge:
    """Held-out questions with the full-precision model's log-probabilities at their answers.

    What the vision tower and the embeddings make of the questions is computed once, unless they are quantised too.
    """

    @torch.no_grad()
    def __init__(self, count: int) -> None:
        model, tokenizer = load(str(MODEL))
        self.batches = []
        for start in range(0, count, 100):
            asked = [ask("evaluation", i) for i in range(start, min(start + 100, count))]
            data = batch([Picture(image, [question]) for image, question in asked], tokenizer, 1)
            self.batches.append(data | {"embedded": embed(model, data)[0]})
        self.teacher = [found for found, _ in self._answers(model)]

    @torch.no_grad()
    def _answers(self, model, whole: bool = False):
        """Per batch: log-probabilities [N, V] at the N answer tokens of all samples, and (sample, label) [N, 2]."""
        for data in self.batches:
            labels = data["labels"][:, 1:]
            learnt = labels != -100
            where = torch.stack([learnt.nonzero()[:, 0], labels[learnt]], 1)
            hidden = answer(model, data, embed(model, data)[0] if whole else data["embedded"])
            yield F.log_softmax(model.lm_head(hidden[:, :-1][learnt]), -1), where

    def __call__(self, folder: Path, whole: bool = False) -> dict[str, float]:
        """Mean KL per answer token and NLL in nats, and exact match in percent, over samples; `whole` as below."""
        return self.judged(load(str(folder))[0], whole)

    def judged(self, model, whole: bool = False) -> dict[str, float]:
        """The same of a model in memory; `whole` if its vision tower or embeddings are not the full-precision ones."""
        kl, nll, exact = [], [], []
        for (found, where), teacher in zip(self._answers(model, whole), self.teacher, strict=True):
            divergence = F.kl_div(found, teacher, log_target=True, reduction="none").sum(-1)
            loss = -found.gather(1, where[:, 1:]).squeeze(1)
            hit = found.argmax(-1) == where[:, 1]
            for sample in where[:, 0].unique():
                own = where[:, 0] == sample
                kl.append(float(divergence[own].mean()))
                nll.append(float(loss[own].mean()))
                exact.append(float(hit[own].all()))
        return {"kl": statistics.mean(kl), "nll": statistics.mean(nll), "exact": 100 * statistics.mean(exact)}


def measure(judge: Judge, pool: Path, options: dict) -> dict[str, float]:
    """Quantise with `options` and judge the twin in 16 bits, or where activations are rounded the checkpoint itself."""
    settings = Settings(**options)
    # whether anything before the decoder's layers may differ from the full-precision model's
    whole = settings.rotate or bool(settings.modules) or {settings.vision_bits, settings.connector_bits} != {KEPT}
    with tempfile.TemporaryDirectory() as folder:
        out, twin = Path(folder) / "out", Path(folder) / "twin"
        quantize(str(MODEL), out, None if settings.method == "rtn" else pool, settings)
        if settings.activation_bits != KEPT:
            return judge(out, whole)
        dequantize(out, twin)
        return judge(twin, whole)


def table(rows: list[dict]) -> str:
    """Mean and standard deviation over seeds, per width and method, as markdown."""
    lines = [
        "| bits | group | method | seeds | KL, nats | NLL, nats | exact, % |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        group = "row" if row["settings"]["group_size"] == -1 else row["settings"]["group_size"]
        groups.setdefault((row["bits"], group, row["name"]), []).append(row)
    for (bits, group, name), found in sorted(groups.items(), key=lambda item: item[0][0]):
        cells = []
        for key, digits in (("kl", 5), ("nll", 4), ("exact", 1)):
            values = [row[key] for row in found]
            spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {bits} | {group} | {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def complete(args: argparse.Namespace, options: Callable[[int, str, int], dict], figures: Callable[[Path, dict], dict]):
    """Measure what the file `args.rows` lacks of `args.bits`, `args.methods` and `args.seeds`, and write the table.

    options(bits, method, seed): what a model is made and judged with; figures(pool, row): what was measured of one made
    from a pool of POOL chats. Rounding to nearest has no seed. Ends where the file has such a model of other options.
    """
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    known = {(row["bits"], row["name"], row["seed"]): row for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        pool = write(Path(folder), "calibration", POOL)
        for bits, name in itertools.product(args.bits, args.methods):
            for seed in args.seeds[:1] if name == "RTN" else args.seeds:
                about = {"bits": bits, "name": name + args.label, "seed": seed} | options(bits, name, seed)
                row = known.get((bits, about["name"], seed))
                if row and (other := {key: value for key, value in about.items() if row.get(key) != value}):
                    sys.exit(
                        f"{args.rows} has {about['name']} at {bits} bits without {other}; give another file or --label"
                    )
                if not row:
                    rows.append(about | figures(pool, about))
                    with args.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if args.table:
        args.table.write_text(table(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=JSON", help="settings for all, e.g. group_size=64"
    )
    parser.add_argument("--recipe", type=Path, help="formats of modules by this recipe of `vlmq sweep`")
    parser.add_argument("--label", default="", help="added to the methods' names, to tell settings apart")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration chats")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--rows", type=Path, default=Path("quality.jsonl"), help="file that is completed")
    parser.add_argument("--table", type=Path, help="markdown file to write at the end")
    args = parser.parse_args()
    extra = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    if args.recipe:
        extra |= widths(args.recipe)
        args.bits = [round(make_plan(str(MODEL), Settings(**extra)).bits_per_weight, 3)]
    judge = Judge(args.questions)

    def options(bits: int, name: str, seed: int) -> dict:
        settings = {"bits": bits, "group_size": GROUPS.get(bits), "samples": args.samples, "seed": seed}
        return {"questions": args.questions, "settings": settings | METHODS[name] | extra}

    complete(args, options, lambda pool, row: measure(judge, pool, row["settings"]))


def widths(recipe: Path) -> dict:
    """The formats of a recipe of `vlmq sweep`."""
    found = read_recipe(recipe)
    return {name: found[name] for name in ("bits", "group_size", "symmetric", "modules")}


if __name__ == "__main__":
    main()
