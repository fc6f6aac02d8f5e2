"""The whole way on a real model: quantise to 3 bits, verify, serve with vLLM, ask, compare. `make demo` runs it.

The model is the trained Qwen2-VL in examples/demo_vlm/model; pictures and questions are drawn, those that are asked
from another seed than those of training and calibration.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from data import write
from evaluate import judge, load
from pictures import TASKS, ask
from server import ask_all, serve

MODEL = Path(__file__).parent / "model"
console = Console(width=110)


def vlmq(*args) -> None:
    command = [str(Path(sys.executable).with_name("vlmq")), *map(str, args)]
    console.print(f"$ vlmq {' '.join(map(str, args))}", style="bold", highlight=False, soft_wrap=True)
    subprocess.run(command, check=True)


def size(folder: Path) -> str:
    """Weights on disk."""
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{total / 1e6:.1f} MB"


@torch.no_grad()
def answers_of(folder: Path, questions: list[tuple]) -> list[str]:
    """Greedy answers by transformers, for comparison."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answers = []
    for image, text in questions:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asked", type=int, default=140, help="questions to the server")
    parser.add_argument("--judged", type=int, default=700, help="questions for the accuracy of all three models")
    args = parser.parse_args()
    began = time.monotonic()
    transformers_logging.disable_progress_bar()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    name = f"W{args.bits}"
    quantized, rounded = args.out / f"vlmq-w{args.bits}", args.out / f"rtn-w{args.bits}"

    calibration = write(args.out / "calibration", "calibration", 128)
    common = ("--bits", args.bits, "--group-size", args.group_size)
    vlmq("quantize", MODEL, "-o", quantized, "--data", calibration, *common)
    vlmq("verify", quantized)
    vlmq("quantize", MODEL, "-o", rounded, "--method", "rtn", *common)

    questions = [ask("evaluation", i) for i in range(args.asked)]
    pairs = [(image, question.text) for image, question in questions]
    log = args.out / "server.log"
    console.print(f"$ vllm serve {quantized} --quantization vlmq   (log: {log})", style="bold", highlight=False)
    with serve(quantized, "--quantization", "vlmq", log=log) as client:
        served = ask_all(client, pairs)
    shown = len(TASKS) * 2
    show_answers(questions[:shown], answers_of(MODEL, pairs[:shown]), served, name)
    right = sum(q.answer == answer for (_, q), answer in zip(questions, served, strict=True))
    console.print(f"{name} through the server: {right} of {args.asked} held-out questions answered exactly right\n")

    twins = {}
    for folder in (quantized, rounded):
        twins[folder] = args.out / f"{folder.name}-dequantized"
        vlmq("dequantize", folder, "-o", twins[folder])
    rows = {"bf16": (MODEL, MODEL), f"{name} RTN": (rounded, twins[rounded])}
    show_accuracy(rows | {f"{name} VLMQ": (quantized, twins[quantized])}, args.judged)
    console.print(f"{time.monotonic() - began:.0f} s in all")


def show_answers(questions: list, original: list[str], served: list[str], name: str) -> None:
    table = Table("task", "question", "expected", "bf16", f"{name}, served", title="Held-out pictures")
    for (_, question), before, after in zip(questions, original, served, strict=False):
        marked = [text if text == question.answer else f"[red]{text}[/red]" for text in (before, after)]
        table.add_row(question.task, question.text, question.answer, *marked)
    console.print(table)


def show_accuracy(rows: dict[str, tuple[Path, Path]], count: int) -> None:
    table = Table("model", "weights", *TASKS, "all", title=f"Exact match in % on {count} held-out questions")
    for name, (folder, sixteen_bit) in rows.items():
        scores = [100 * hit for hit, _ in judge(*load(str(sixteen_bit)), "evaluation", count).values()]
        table.add_row(name, size(folder), *(f"{s:.0f}" for s in scores), f"{sum(scores) / len(scores):.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
