"""Writes text chats that the language model answers itself: `python benchmarks/real_lm/chats.py MODEL OUT`.

Questions are topics times templates, answers are sampled (temperature 0.7), so that they lie on the model's own
distribution. The splits "train", "calibration" and "evaluation" have neither a topic nor a template in common. A line
is one chat, as `vlmq quantize --data` reads it.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

TOPICS = {
    "calibration": "volcanoes, photosynthesis, the Roman Empire, jazz, black holes, baking bread, the French "
    "Revolution, honey bees, electric cars, chess, the human heart, inflation, Shakespeare, coral reefs, the internet, "
    "vaccines, mountaineering, the Moon, tea, democracy, whales, solar panels, the printing press, dreams, rivers, "
    "robots, the stock market, poetry, earthquakes, bicycles, gardening, the Silk Road, antibiotics, deserts, comets, "
    "glaciers, algebra, cathedrals, penguins, radio",
    "evaluation": "oceans, gravity, ancient Egypt, the guitar, the Milky Way, cheese, the Industrial Revolution, "
    "butterflies, trains, football, the brain, taxes, novels, rain forests, telephones, viruses, sailing, Mars, "
    "coffee, elections, elephants, wind turbines, libraries, memory",
    "train": "clouds, magnetism, the Vikings, opera, dinosaurs, chocolate, the Renaissance, spiders, aeroplanes, "
    "swimming, the lungs, banks, fairy tales, wetlands, computers, bacteria, skiing, Jupiter, soup, parliaments, "
    "wolves, dams, museums, sleep, islands, clocks, insurance, theatre, tornadoes, horses, forestry, canals, "
    "painkillers, caves, meteors, snow, geometry, castles, owls, television",
}
TEMPLATES = {
    "calibration": (
        "What are {} and why do they matter?",
        "Explain {} to a ten year old.",
        "Write a short story about {}.",
        "List three interesting facts about {}.",
        "How have people seen {} over the last hundred years?",
        "Give me advice for someone who wants to learn about {}.",
        "Write a Python function that has to do with {}, with a docstring.",
        "What is a common misconception about {}?",
    ),
    "evaluation": (
        "Tell me about {} in a few sentences.",
        "Write an email to a friend about {}.",
        "What questions do scientists still have about {}?",
        "Compare {} with something people know well.",
        "Describe {} in a poem.",
        "Why do people care about {}?",
        "Give a step by step plan for a lesson on {}.",
    ),
    "train": (
        "Give an introduction to {}.",
        "What would a museum show about {}?",
        "Summarise the history of {}.",
        "Invent a dialogue about {}.",
        "Which words does one need to talk about {}?",
        "What is difficult about {}?",
    ),
}
COUNTS = {"calibration": 256, "evaluation": 160, "train": 240}
TOKENS, TOGETHER = 110, 32


def questions(split: str) -> list[str]:
    """Every topic in every template of a split, in random order."""
    asked = [template.format(topic) for topic in TOPICS[split].split(", ") for template in TEMPLATES[split]]
    random.Random(split).shuffle(asked)
    return asked


@torch.inference_mode()
def answers(model, processor, asked: list[str]) -> list[str]:
    """One sampled answer to each question."""
    chats = [[{"role": "user", "content": question}] for question in asked]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    found = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=True, temperature=0.7, top_p=0.95)
    replies = found[:, inputs["input_ids"].shape[1] :]
    return [whole_sentences(text) for text in processor.batch_decode(replies, skip_special_tokens=True)]


def whole_sentences(text: str) -> str:
    """The text as far as its last sentence or line goes: the end mark that follows in a chat belongs after one."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=\s|$)|\n", text)]
    return text[: ends[-1]].strip() if ends else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    torch.manual_seed(0)
    for split, count in COUNTS.items():
        asked = questions(split)
        with (args.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for start in range(0, count, TOGETHER):
                some = asked[start : min(start + TOGETHER, count)]
                for question, answer in zip(some, answers(model, processor, some), strict=True):
                    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
                    if answer:
                        file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main()
