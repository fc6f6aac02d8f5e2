"""Measures the quality of Q-VLM on the demo model, with weights and activations rounded alike.

    python benchmarks/quality/qvlm.py --bits 4 6 8 --seeds 1 2

Rounding stays in floating point (`benchmarks/qvlm_fake/fake_stack.py`): all linears of the vision tower's blocks and of
the decoder's layers, their inputs per token in the tower and per channel in the decoder. The connector, the embeddings
and the head are left alone. Methods on the same chats:

    whole range    every activation range from its least to its greatest value
    greedy         a percentile for every layer, chosen at its own output
    joint          the same, chosen together in blocks of up to three layers
    joint, vision  joint, after a tower whose bounds were learnt first; "whole range, vision" likewise

The judge is that of `compare_methods.py`. One line per model goes to a JSONL file, which a later run completes.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path
sys.path.insert(0, str(Path(__file__).absolute().parents[2] / "examples/demo_vlm"))

from benchmarks.quality.compare_methods import MODEL, Judge, complete
from benchmarks.qvlm_fake.clipped_inputs import clip_rows
from benchmarks.qvlm_fake.fake import PERCENTILES, rounding, row_ranges
from benchmarks.qvlm_fake.fake_stack import RoundedStack, search_stack
from evaluate import load
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.inputs import load_processor, model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.data.token_kinds import answer_labels, token_kinds, vision_ids
from vlmq_vllm.offline.methods.qvlm.bounds import Hyperparameters, learn_bounds
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import linears_of, put
from vlmq_vllm.offline.model.source import Source

CPU = torch.device("cpu")
PAIRS = 64  # chats of a run, and
TOKENS = 480  # of a batch, about eight chats: as many as the paper has
METHODS = {
    "whole range": {"depth": 1, "percentiles": (1.0,)},
    "greedy": {"depth": 1, "percentiles": PERCENTILES},
    "joint": {"depth": 3, "percentiles": PERCENTILES},
    "joint, vision": {"depth": 3, "percentiles": PERCENTILES},
    "whole range, vision": {"depth": 1, "percentiles": (1.0,)},
}


def draw(source: Source, pool: Path, seed: int) -> tuple[list[dict], list[torch.Tensor]]:
    """Batches of PAIRS chats and the labels of their answers."""
    processor = load_processor(source.folder)
    samples = []
    for chat, inputs in model_inputs(read_chats(pool, seed), processor, PAIRS, 2048):
        ids = inputs["input_ids"]
        inputs["kinds"] = token_kinds(chat, ids[0].tolist(), processor, vision_ids(source.config))[None]
        samples.append(inputs)
    batches = batched(samples, TOKENS)
    return batches, [answer_labels(batch["input_ids"], batch.pop("kinds")) for batch in batches]


def pair(source: Source, stack: str, batches: list[dict]) -> list[list]:
    """U and F of a stack in front of which nothing is rounded."""
    streams = capture(source, stack, batches, CPU)
    return [streams, [replace(stream) for stream in streams]]


def learnt(
    source: Source, names: list[str], bits: int, tower: RoundedStack, data: tuple, hyper: Hyperparameters
) -> list[dict]:
    """Learn the tower's bounds from where the search has left them, in place; the losses of each epoch."""
    clipped = {}
    for name, share in zip(names, tower.shares, strict=True):
        block = source.materialise(name, CPU)
        for linear in linears_of(block):
            weight = block.get_submodule(linear).weight.detach()
            clipped[f"{name}.{linear}"] = clip_rows(weight, row_ranges(weight, 1 << bits), bits, share)
        source.release(name)
    losses = learn_bounds(source, *data, clipped, CPU, hyper)
    for name, own in clipped.items():
        tower.weights[name], tower.rounders[name] = own.weight().detach(), own.inputs
    return [loss._asdict() for loss in losses]


def measure(judge: Judge, pool: Path, bits: int, name: str, seed: int, hyper: Hyperparameters) -> dict:
    """Round tower and decoder and judge the model."""
    source, how, losses = Source(MODEL), METHODS[name], []
    batches, labels = draw(source, pool, seed)
    family = source.family
    blocks, layers = (
        [f"{stack}.{i}" for i in range(len(source.model.get_submodule(stack)))]
        for stack in (family.blocks, family.layers)
    )
    tower = search_stack(source, blocks, bits, True, *pair(source, family.blocks, batches), CPU, **how)
    if name.endswith(", vision"):
        losses = learnt(source, blocks, bits, tower, (batches, labels), hyper)
    full = capture(source, family.layers, batches, CPU)
    source.quantized = {f"{linear}.weight": weight for linear, weight in tower.weights.items()}.get
    with removing(rounding(source.model, tower.rounders)):
        quantized = capture(source, family.layers, batches, CPU, quantized=True)
    decoder = search_stack(source, layers, bits, False, quantized, full, CPU, **how)
    model, _ = load(str(MODEL))
    for linear, weight in (tower.weights | decoder.weights).items():
        put(model, linear, weight)
    with torch.no_grad(), removing(rounding(model, tower.rounders | decoder.rounders)):
        scores = judge.judged(model, whole=True)
    last = decoder.choices[-1]
    return scores | {
        "error": last.error,
        "blocks": [len(block) for block in decoder.blocks],
        "shares": decoder.shares,
        "tower": tower.shares,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=NUMBER", help="of bounds.Hyperparameters, e.g. rate=0.01"
    )
    parser.add_argument("--label", default="", help="added to the methods' names, to tell settings apart")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rows", type=Path, default=Path("qvlm.jsonl"), help="file that is completed")
    parser.add_argument("--table", type=Path, help="markdown file to write at the end")
    args = parser.parse_args()
    hyper = Hyperparameters(
        **{name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    )
    judge = Judge(args.questions)

    def options(bits: int, name: str, seed: int) -> dict:
        return {"questions": args.questions, "settings": {"method": name, "group_size": -1} | asdict(hyper)}

    def figures(pool: Path, row: dict) -> dict:
        return measure(judge, pool, row["bits"], row["settings"]["method"], row["seed"], hyper)

    complete(args, options, figures)


if __name__ == "__main__":
    main()
