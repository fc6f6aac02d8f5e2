"""Tries what is not in the product: `python benchmarks/real_lm/tried.py demo` or `... tried.py MODEL --chats CHATS`.

An idea replaces one function of the product while one model is quantised, in this process; the judges are those of
`judge.py` and, for the demo model, of `benchmarks/quality/compare_methods.py`. Baselines run here as well, from the
same chats, so that an idea is compared with its baseline chat by chat, or on the demo model seed by seed.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path
sys.path.insert(0, str(Path(__file__).absolute().parents[1] / "quality"))
sys.path.insert(0, str(Path(__file__).absolute().parents[2] / "examples/demo_vlm"))
import compare_methods
import judge as text_judge
from free_values import FreeWeight
from ideas import IDEAS, Idea
from methods import GROUP_SIZE, QEP, write_drawn
from rows import Rows

from data import write
from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.model.layers import linear_of
from vlmq_vllm.offline.run.layer_quantizer import LayerQuantizer
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings


def twin_of(idea: Idea, model: Path, data: Path, settings: Settings, folder: Path) -> tuple[Path, float]:
    """The model that an idea makes, in 16 bits, and its bits per weight."""
    served: dict[str, torch.Tensor] = {}
    bits: list[tuple[int, float]] = []
    original = LayerQuantizer.solve

    def solve(self, layer, stage, token_weights) -> Iterator:
        for linear, solution in original(self, layer, stage, token_weights):
            name, weight = self.source.module_in_files(layer.full(linear)), linear_of(layer.module, linear).weight
            served[f"{name}.weight"] = weight.to(solution.weight.scale.dtype)
            bits.append((weight.numel(), bits_per_weight(solution.weight, *weight.shape)))
            yield linear, solution

    out, twin = folder / "out", folder / "twin"
    with ExitStack() as stack:
        stack.enter_context(patch.object(LayerQuantizer, "solve", solve))
        if idea.replaced:
            stack.enter_context(patch.object(*idea.replaced))
        quantize(str(model), out, data, settings)
    dequantize(out, twin)
    for path in twin.glob("*.safetensors"):
        whole = load_file(path) | served
        path.unlink()  # what was read may still lie in it
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path, {"format": "pt"})
    return twin, sum(count * own for count, own in bits) / sum(count for count, _ in bits)


def bits_per_weight(weight: QuantizedWeight, rows: int, columns: int) -> float:
    """With what is stored beside the codes: scales and zero points, or values of 16 bits."""
    format = weight.format
    if isinstance(weight, FreeWeight):
        return format.bits + 16 * format.levels * format.groups(columns) / columns
    return format.bits_per_weight(rows, columns)


class OfTexts:
    """`judge.Judge` on texts, with the KL of every chat."""

    def __init__(self, model: Path, chats: Path, judged: int | None) -> None:
        self.chats, self.judge = chats, text_judge.Judge(model, chats, judged or text_judge.TEXTS, 0)

    def drawn(self, folder: Path, seed: int) -> Path:
        return write_drawn(folder, self.chats, "text", seed)

    def __call__(self, twin: Path, rotated: bool) -> dict:
        found = self.judge(twin)
        names = {"kl": "text_kl", "nll": "text_nll", "right": "text_top1", "chats": "text_kls"}
        return {name: found[known] for name, known in names.items()}


class OfPictures:
    """The judge of the demo model."""

    def __init__(self, judged: int | None) -> None:
        self.judge = compare_methods.Judge(judged or 1000)
        self.folder = tempfile.TemporaryDirectory()
        self.pool = write(Path(self.folder.name), "calibration", compare_methods.POOL)

    def drawn(self, folder: Path, seed: int) -> Path:
        return self.pool  # from which the run draws by its seed

    def __call__(self, twin: Path, rotated: bool) -> dict:
        found = self.judge(twin, rotated)
        return {"kl": found["kl"], "nll": found["nll"], "right": found["exact"]}


def compared(rows: list[dict]) -> str:
    """Markdown: every model with its difference to its baseline, over chats, or where there are none over seeds."""
    lines = ["| bits | bits per weight | idea | seeds | KL, nats | difference to | nats | top-1 or exact, % |"]
    lines.append("| ---: | ---: | --- | ---: | ---: | --- | ---: | ---: |")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["name"]), []).append(row)
    for (bits, name), found in sorted(groups.items(), key=lambda item: (item[0][0], item[1][0]["kl"])):
        against = found[0]["against"]
        base = {row["seed"]: row for row in rows if (row["bits"], row["name"]) == (bits, against)}
        pairs = [pair for row in found if row["seed"] in base for pair in _paired(row, base[row["seed"]])]
        apart = [a - b for a, b in pairs]
        told = f"{statistics.mean(apart):+.5f}" if apart else ""
        told += f" ({statistics.stdev(apart) / len(apart) ** 0.5:.5f})" if len(apart) > 1 else ""
        kl, right = (statistics.mean(row[key] for row in found) for key in ("kl", "right"))
        stored = found[0]["bits_per_weight"]
        lines.append(f"| {bits} | {stored:.3f} | {name} | {len(found)} | {kl:.5f} | {against} | {told} | {right:.1f} |")
    return "\n".join(lines)


def _paired(row: dict, base: dict) -> list[tuple[float, float]]:
    return list(zip(row["chats"], base["chats"], strict=True)) if "chats" in row else [(row["kl"], base["kl"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or demo")
    parser.add_argument("--chats", type=Path, help="of the real model")
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS))
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--group-size", type=int, help="columns that share a grid, or free values")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--judged", type=int, help="chats, or questions about pictures")
    parser.add_argument("--label", default="", help="added to the ideas' names, to tell settings apart")
    parser.add_argument("--rows", type=Path, default=Path("tried.jsonl"), help="file that is completed")
    args = parser.parse_args()
    rows, demo = Rows(args.rows), args.model == "demo"
    model = compare_methods.MODEL if demo else Path(args.model)
    judge = OfPictures(args.judged) if demo else OfTexts(model, args.chats, args.judged)
    for bits, seed, name in itertools.product(args.bits, args.seeds, args.ideas):
        idea = IDEAS[name]
        settings = {"bits": bits, "group_size": args.group_size or (128 if demo else GROUP_SIZE), "seed": seed}
        about = {"bits": bits, "name": name + args.label, "seed": seed, "calibration": "demo" if demo else "text"}
        about["settings"] = settings | QEP | idea.settings
        if rows.has(about):
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = judge.drawn(Path(folder), seed)
            start = time.process_time()
            twin, stored = twin_of(idea, model, data, Settings(**about["settings"]), Path(folder))
            cost = {"bits_per_weight": round(stored, 4), "cpu_seconds": round(time.process_time() - start, 1)}
            rows.add(about | {"against": idea.against} | cost | judge(twin, "rotate" in idea.settings))
    print(compared(rows.all))


if __name__ == "__main__":
    main()
