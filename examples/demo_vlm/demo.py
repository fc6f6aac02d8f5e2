"""Goes the whole way on a real model: quantise to 3 bits, verify, serve with vLLM, ask, compare. `make demo` runs it.

The model is the trained Qwen2-VL in examples/demo_vlm/model; pictures and questions are drawn, those that are asked
from another seed than those of training and calibration.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from data import write
from evaluate import judge, load
from pictures import TASKS, ask
from server import ask_all, serve

MODEL = Path(__file__).parent / "model"
GROUP_SIZE = 128
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
    parser.add_argument("--asked", type=int, default=140, help="questions to the server")
    parser.add_argument("--judged", type=int, default=700, help="questions for the table of accuracies")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the server is stopped then, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    transformers_logging.disable_progress_bar()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    calibration = write(args.out / "calibration", "calibration", 128)

    served = args.out / "w3-vlmq"
    quantize(served, 3, "vlmq", calibration)
    vlmq("verify", served)
    questions = [ask("evaluation", i) for i in range(args.asked)]
    pairs = [(image, question.text) for image, question in questions]
    log = args.out / "server.log"
    console.print(f"$ vllm serve {served} --quantization vlmq   (log: {log})", style="bold", highlight=False)
    with serve(served, "--quantization", "vlmq", log=log) as client:
        answers = ask_all(client, pairs)
    shown = 2 * len(TASKS)
    show_answers(questions[:shown], answers_of(MODEL, pairs[:shown]), answers)
    right = sum(question.answer == answer for (_, question), answer in zip(questions, answers, strict=True))
    console.print(f"W3 through the server: {right} of {args.asked} held-out questions answered exactly right\n")

    models = {"bf16": (MODEL, MODEL)}
    for bits, method in ((3, "rtn"), (3, "vlmq"), (2, "rtn"), (2, "vlmq")):
        folder = args.out / f"w{bits}-{method}"
        if folder != served:
            quantize(folder, bits, method, calibration)
        models[f"W{bits} {method.upper()}"] = (folder, dequantized(folder))
    show_accuracy(models, args.judged)
    console.print(f"{time.monotonic() - began:.0f} s in all")


def quantize(folder: Path, bits: int, method: str, calibration: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    data = () if method == "rtn" else ("--data", calibration)
    vlmq("quantize", MODEL, "-o", folder, "--bits", bits, "--group-size", GROUP_SIZE, "--method", method, *data)


def dequantized(folder: Path) -> Path:
    """The same weights in bf16, for a quick look with transformers at more questions than the server was asked."""
    twin = folder.with_name(f"{folder.name}-dequantized")
    shutil.rmtree(twin, ignore_errors=True)
    vlmq("dequantize", folder, "-o", twin)
    return twin


def show_answers(questions: list, original: list[str], served: list[str]) -> None:
    table = Table("task", "question", "expected", "bf16", "W3, served", title="Held-out pictures")
    for (_, question), before, after in zip(questions, original, served, strict=False):
        marked = [Text(text or "", "" if text == question.answer else "red") for text in (before, after)]
        table.add_row(question.task, question.text, question.answer, *marked)
    console.print(table)


def show_accuracy(models: dict[str, tuple[Path, Path]], count: int) -> None:
    """`models`: name -> (folder as served, the same weights in 16 bits)."""
    title = f"Exact match in % on {count} held-out questions, and nats per token of the right answers"
    table = Table("model", "weights", *TASKS, "all", "NLL", title=title)
    for name, (folder, sixteen_bit) in models.items():
        scores = judge(*load(str(sixteen_bit)), "evaluation", count).values()
        exact = [100 * hit for hit, _ in scores]
        loss = sum(loss for _, loss in scores) / len(scores)
        figures = [f"{percent:.0f}" for percent in exact] + [f"{sum(exact) / len(exact):.1f}", f"{loss:.3f}"]
        table.add_row(name, size(folder), *figures)
    console.print(table)


if __name__ == "__main__":
    main()
