"""Makes training batches: many questions about one picture in one sequence, none of which sees another.

A sequence is a shared prefix (chat header and 36 vision tokens) followed by branches, one per question. A branch
attends to the prefix and to itself, and its positions start right after the picture: to the model each question is
asked alone, while the vision tower runs once for all of them. Asked in turns, later questions could copy from earlier
answers, and the model would never learn to look.
"""

import numpy as np
import torch

from pictures import COLOURS, FIELDS, SHAPES, SIDE, SIGNS, Picture

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
GRID = SIDE // CELL
TAGS = (*SHAPES, *COLOURS, *SIGNS, *FIELDS, *(f"value {v}" for v in range(1, 10)))
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # CLIP's, as in the Qwen2-VL image processor
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def patches(image) -> np.ndarray:
    """The picture as Qwen2VLImageProcessor cuts it: [144, 3 * 2 * 14 * 14] float32, 2 x 2 patches side by side."""
    pixels = (np.asarray(image, dtype=np.float32) / 255 - MEAN) / DEVIATION
    tiles = pixels.reshape(GRID, MERGE, PATCH, GRID, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    tiles = np.repeat(tiles.reshape(-1, 3, 1, PATCH, PATCH), 2, axis=2)  # a still image is two equal frames
    return tiles.reshape(-1, 3 * 2 * PATCH * PATCH)


def tags(picture: Picture) -> np.ndarray:
    """What lies under each vision token: [36, len(TAGS)] float32 of 0 and 1."""
    table = np.zeros((GRID, GRID, len(TAGS)), dtype=np.float32)
    edges = CELL * np.arange(GRID)
    for (left, top, right, bottom), tag in picture.marks:
        across = np.clip(np.minimum(right, edges + CELL) - np.maximum(left, edges), 0, None)
        down = np.clip(np.minimum(bottom, edges + CELL) - np.maximum(top, edges), 0, None)
        enough = 0.3 * min(CELL * CELL, (right - left) * (bottom - top))
        table[np.outer(down, across) > enough, TAGS.index(tag)] = 1
    return table.reshape(-1, len(TAGS))


def batch(pictures: list[Picture], tokenizer, questions: int) -> dict[str, torch.Tensor]:
    """Tensors of one step; at most `questions` per picture.

    ids, labels [B, L] int64 (labels -100 where not learnt), positions [3, B, L], mask [B, 1, L, L] bool (True: sees),
    pixels [B * 144, 1176], tags [B * 36, len(TAGS)], branch [B, L] (-1: padding, 0: prefix, then one per question).
    """
    head = tokenizer.encode("<|im_start|>user\n<|vision_start|>")
    prefix = head + [tokenizer.convert_tokens_to_ids("<|image_pad|>")] * GRID * GRID
    prefix += tokenizer.encode("<|vision_end|>")
    rows = [_row(p, tokenizer, prefix, len(head), questions) for p in pictures]
    length = max(len(row["ids"]) for row in rows)
    fill = {"ids": tokenizer.pad_token_id, "labels": -100, "branch": -1, "t": 0, "h": 0, "w": 0}
    table = {k: torch.tensor([row[k] + [v] * (length - len(row[k])) for row in rows]) for k, v in fill.items()}
    branch, order = table["branch"], torch.arange(length)
    mask = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return {
        "ids": table["ids"],
        "labels": table["labels"],
        "branch": branch,
        "positions": torch.stack([table["t"], table["h"], table["w"]]),
        "mask": (mask & (order[:, None] >= order[None, :]))[:, None],
        "pixels": torch.from_numpy(np.concatenate([patches(p.image) for p in pictures])),
        "tags": torch.from_numpy(np.concatenate([tags(p) for p in pictures])),
    }


def _row(picture: Picture, tokenizer, prefix: list[int], head: int, questions: int) -> dict[str, list[int]]:
    ids, labels, branch = list(prefix), [-100] * len(prefix), [0] * len(prefix)
    t = list(range(head)) + [head] * GRID * GRID + [head + GRID]
    h = list(range(head)) + [head + i for i in range(GRID) for _ in range(GRID)] + [head + GRID]
    w = list(range(head)) + [head + i for _ in range(GRID) for i in range(GRID)] + [head + GRID]
    for number, question in enumerate(picture.questions[:questions], start=1):
        asked = tokenizer.encode(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
        answer = tokenizer.encode(f"{question.answer}<|im_end|>")
        span = list(range(head + GRID + 1, head + GRID + 1 + len(asked) + len(answer)))
        ids += asked + answer
        labels += [-100] * len(asked) + answer
        branch += [number] * len(span)
        t, h, w = t + span, h + span, w + span
    return {"ids": ids, "labels": labels, "branch": branch, "t": t, "h": h, "w": w}
