"""Puts calibration samples of one length together into batches, so that nothing is ever padded."""

from collections.abc import Iterable

import torch

TOKENS = 2048  # of a batch at most, unless a single sample has more


def batched(samples: Iterable[dict], limit: int = TOKENS) -> list[dict]:
    """Batches of samples whose tensors agree in all but their first dimension, along which they are put together, in
    the order of their first samples. A sample has `input_ids` [1, T] and pictures in tensors of their own."""
    open_batches: dict[tuple, list[dict]] = {}
    done: list[list[dict]] = []
    for sample in samples:
        key = tuple(sorted((name, tuple(value.shape[1:])) for name, value in sample.items()))
        batch = open_batches.get(key)
        if batch is None or (len(batch) + 1) * sample["input_ids"].shape[1] > limit:
            batch = open_batches[key] = []
            done.append(batch)
        batch.append(sample)
    return [{name: torch.cat([sample[name] for sample in batch]) for name in batch[0]} for batch in done]
