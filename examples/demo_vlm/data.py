"""Draws chats with pictures into a folder, as `vlmq quantize --data` reads them: `python data.py OUT --count 128`."""

import argparse
import json
from pathlib import Path

from pictures import ask


def write(folder: Path, split: str, count: int) -> Path:
    """Draw `count` pictures of `split` with one question and answer each; returns the JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        image, question = ask(split, i)
        image.save(folder / f"{i:05d}.png")
        asked = [{"type": "image", "image": f"{i:05d}.png"}, {"type": "text", "text": question.text}]
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": question.answer}]
        lines.append(json.dumps({"messages": chat}))
    path = folder / f"{split}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="calibration", choices=("calibration", "validation", "evaluation"))
    parser.add_argument("--count", type=int, default=128)
    args = parser.parse_args()
    print(write(args.out, args.split, args.count))
