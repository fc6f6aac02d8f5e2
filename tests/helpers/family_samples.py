"""Samples and streams for the models of `family_models.py`: drawn pictures, questions and answers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from family_models import build
from vlmq_vllm.offline.data.inputs import load_processor, prepare
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.data.token_kinds import answer_labels, token_kinds, vision_ids
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

CPU = torch.device("cpu")
IMAGE = {"type": "image"}
# (pictures' sizes, turns): a picture of each size, two pictures with text between them, two turns, and no picture
CHATS = (
    (((56, 56),), (([IMAGE, "What is the colour?"], "It is red."),)),
    (((112, 56), (56, 56)), ((["First", IMAGE, "then", IMAGE, "what?"], "There are two signs."),)),
    (((56, 84),), (([IMAGE, "How many?"], "Two"), (["Which number?"], "one and two"))),
    ((), ((["Describe the text."], "A word."),)),
)


@dataclass(frozen=True)
class Sample:
    """chat: as `offline/data/read.py` reads it. inputs: of the processor, of one chat. kinds, labels: [1, T]."""

    chat: dict
    inputs: dict[str, torch.Tensor]
    kinds: torch.Tensor
    labels: torch.Tensor


def write_chats(folder: Path) -> Path:
    """A JSONL file of CHATS with its pictures."""
    lines = []
    for i, (sizes, turns) in enumerate(CHATS):
        names = [f"{i}-{j}.png" for j in range(len(sizes))]
        for size, name in zip(sizes, names, strict=True):
            Image.effect_noise(size, 64).convert("RGB").save(folder / name)
        places = iter(names)
        messages = []
        for asked, answer in turns:
            parts = [
                {"type": "text", "text": part} if isinstance(part, str) else part | {"image": next(places)}
                for part in asked
            ]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


def make_samples(name: str, folder: Path) -> tuple[Source, object, list[Sample]]:
    """The tiny model of family `name`, its processor, and the samples of CHATS."""
    build(name, folder / "model")
    source, processor = Source(folder / "model"), load_processor(folder / "model")
    vision = vision_ids(source.config)
    samples = []
    for chat in read_all(write_chats(folder)):
        inputs = prepare(chat, processor)[0]
        kinds = token_kinds(chat, inputs["input_ids"][0].tolist(), processor, vision)[None]
        samples.append(Sample(chat, inputs, kinds, answer_labels(inputs["input_ids"], kinds)))
    return source, processor, samples


def streams_of(source: Source, samples: list[Sample]) -> list[Stream]:
    """One stream for each sample, in front of the decoder's first layer."""
    return capture(source, source.family.layers, [sample.inputs for sample in samples], CPU)


def asked_of(folder: Path):
    """Inputs of one question about a picture of noise, from the folder's own processor."""
    processor = AutoProcessor.from_pretrained(folder)
    asked = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], tokenize=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    return processor(text=[text], images=[image], return_tensors="pt")
