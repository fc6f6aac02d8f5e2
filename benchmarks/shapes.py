"""Makes models of true widths with random weights, and chats of exact length: `python benchmarks/shapes.py 2b OUT`.

Speed and memory of a quantiser depend on widths and tokens, not on what the weights say. Architecture, tokenizer,
processor and token ids are the demo model's, the sizes are the published ones. Weights are drawn one shard at a time.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

DEMO = Path(__file__).parents[1] / "examples/demo_vlm/model"
SHARD = 512 << 20  # bytes
SIDE = 448  # pixels: 16 x 16 = 256 vision tokens
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TINY_TOWER = {"depth": 1, "embed_dim": 192, "num_heads": 3}
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16}
LAYER_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SHAPES = {  # name: (language model, vision tower, embeddings shared with lm_head)
    "7b-layer": (LAYER_7B, TINY_TOWER, False),
    "7b": (LAYER_7B | {"num_hidden_layers": 28, "vocab_size": 152064}, TOWER, False),
    "2b": (
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        TOWER,
        True,
    ),
}


def write_model(shape: str, folder: Path) -> None:
    """A checkpoint of that shape in bfloat16, with the names that the hub's Qwen2-VL files have."""
    _write_weights(write_settings(shape, folder), folder)


def write_settings(shape: str, folder: Path, decoder_layers: int | None = None) -> dict[str, torch.Size]:
    """All of a checkpoint in the new `folder` but its weights, whose shapes are returned by the files' names.

    decoder_layers: instead of as many as the shape has.
    """
    folder.mkdir(parents=True)
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    text, vision, tied = SHAPES[shape]
    config = json.loads((DEMO / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    config["vision_config"] |= vision | {"hidden_size": text["hidden_size"]}
    layers = decoder_layers or text["num_hidden_layers"]
    more = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, "max_window_layers": layers}
    more |= {"max_position_embeddings": 32768}
    config["text_config"] |= text | more | {"rope_parameters": ROPE}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(config))
    return {_file_name(name): parameter.shape for name, parameter in model.named_parameters()}


def _file_name(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _write_weights(shapes: dict[str, torch.Size], folder: Path) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        size += 2 * shapes[name].numel()
        if size > SHARD and shards[-1]:
            shards.append([])
            size = 2 * shapes[name].numel()
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: draw(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """As at the start of a training: matrices normal with deviation 0.02, norms one, biases zero."""
    if len(shape) > 1:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return (torch.zeros if name.endswith(".bias") else torch.ones)(shape, dtype=torch.bfloat16)


def write_chats(folder: Path, count: int, tokens: int) -> Path:
    """`count` chats of one picture (256 tokens) and a text that fills them up to exactly `tokens`; the JSONL file."""
    folder.mkdir(parents=True)
    processor = AutoProcessor.from_pretrained(DEMO)
    draw = random.Random(0)
    noise = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"messages": _messages(f"{i:05d}.png", _text(processor, image, tokens, draw))}))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _messages(image: str, text: str) -> list[dict]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]


def _text(processor, image, tokens: int, draw: random.Random) -> str:
    """Words of random letters, then digits, which are one token each whatever stands before them."""
    prompt = processor.apply_chat_template(_messages("", "0"), tokenize=False)
    left = tokens + 1 - processor(text=[prompt], images=[image], return_tensors="pt")["input_ids"].shape[1]
    if left < 1:
        raise SystemExit(f"a picture takes more than {tokens} tokens; give at least {tokens + 1 - left}")
    text = ""
    while True:
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8)))
        longer = f"{text} {word}".strip()
        used = len(processor.tokenizer.encode(longer))
        if used > left - 1:
            break
        text = longer
    missing = left - len(processor.tokenizer.encode(text))
    return text + "".join(draw.choices("0123456789", k=missing))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="new folder; gets model/ and chats/")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    write_model(args.shape, args.out / "model")
    print(write_chats(args.out / "chats", args.count, args.tokens))
