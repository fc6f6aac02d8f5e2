"""Text chats as token ids, and the hidden states that predict their answers: training and the judge share them."""

import json
from pathlib import Path

import torch

Chat = tuple[list[int], int]  # token ids, and where the answer begins


def read_chats(path: Path, tokenizer) -> list[Chat]:
    """The chats of a file of `chats.py`, in the words of the model's chat template."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        asked, answered = (turn["content"] for turn in json.loads(line)["messages"])
        head = tokenizer.encode(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")
        found.append((head + tokenizer.encode(f"{answered}<|im_end|>"), len(head)))
    return found


def padded(chats: list[Chat], pad: int) -> dict[str, torch.Tensor]:
    """ids, mask [B, L] int64, filled up on the right, and answered [B, L] bool: the places that predict an answer's
    token."""
    length = max(len(ids) for ids, _ in chats)
    places = torch.arange(length)
    return {
        "ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in chats]),
        "mask": torch.stack([places < len(ids) for ids, _ in chats]).long(),
        "answered": torch.stack([(places >= start - 1) & (places < len(ids) - 1) for ids, start in chats]),
    }


def hidden_states(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the batch's answered places, [N, d]; the head makes logits of them."""
    found = model.model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False)
    return found.last_hidden_state[batch["answered"]]
