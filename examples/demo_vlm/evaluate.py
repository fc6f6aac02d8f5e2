"""Measures exact-match accuracy on held-out questions, each asked alone: `python evaluate.py MODEL [MODEL ...]`.

An answer counts when every token of it, end mark included, is the likeliest one after the right tokens. For
exact match that is the same as comparing with the greedily generated answer, and needs one forward pass per question.
"""

import argparse

import torch
from torch.nn import functional as F

from batches import batch
from pictures import TASKS, Picture, ask


def embed(model, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the language model [B, L, hidden], pictures in their places, and the merged vision features
    [B * 36, hidden], for a batch of `batches.batch`."""
    grid = torch.tensor([[1, 12, 12]] * len(data["ids"]), device=data["ids"].device)
    features = model.model.visual(data["pixels"], grid_thw=grid).pooler_output
    embedded = model.get_input_embeddings()(data["ids"])
    is_image = (data["ids"] == model.config.image_token_id)[..., None]
    return embedded.masked_scatter(is_image, features.to(embedded.dtype)), features


def answer(model, data: dict[str, torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
    """The language model's last hidden states [B, L, hidden]."""
    return model.model.language_model(
        inputs_embeds=embedded,
        position_ids=data["positions"],
        attention_mask={"full_attention": data["mask"]},
        use_cache=False,
    ).last_hidden_state


def forward(model, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, L, V] for a batch of `batches.batch`, and the merged vision features [B * 36, hidden]."""
    embedded, features = embed(model, data)
    return model.lm_head(answer(model, data, embedded)), features


@torch.no_grad()
def judge(model, tokenizer, split: str, count: int) -> dict[str, tuple[float, float]]:
    """Per task: share of exact answers, and mean negative log-likelihood of the right answer's tokens (nats)."""
    device = model.device.type
    found: dict[str, list[tuple[bool, float]]] = {task: [] for task in TASKS}
    for start in range(0, count, 64):
        asked = [ask(split, i) for i in range(start, min(start + 64, count))]
        data = batch([Picture(image, [question]) for image, question in asked], tokenizer, 1)
        data = {name: tensor.to(device) for name, tensor in data.items()}
        with torch.autocast(device, torch.bfloat16):
            logits, _ = forward(model, data)
        labels, logits = data["labels"][:, 1:], logits[:, :-1].float()
        learnt = labels != -100
        hits = ((logits.argmax(-1) == labels) | ~learnt).all(1)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) / learnt.sum(1)
        for (_, question), hit, loss in zip(asked, hits.tolist(), losses.tolist(), strict=True):
            found[question.task].append((hit, loss))
    return {
        task: tuple(sum(column) / len(column) for column in zip(*rows, strict=True)) for task, rows in found.items()
    }


def load(folder: str):
    """The model in float32 and its tokenizer."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    print(f"{'model':40}" + "".join(f"{task:>11}" for task in (*TASKS, "all", "NLL")))
    for folder in args.models:
        scores = judge(*load(folder), "evaluation", args.count)
        exact = [hit for hit, _ in scores.values()]
        loss = sum(loss for _, loss in scores.values()) / len(scores)
        figures = "".join(f"{100 * x:10.1f}%" for x in (*exact, sum(exact) / len(exact)))
        print(f"{folder[-40:]:40}{figures}{loss:11.4f}", flush=True)


if __name__ == "__main__":
    main()
