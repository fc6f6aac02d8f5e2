"""Labels of a language model's loss: which tokens are to be predicted."""

from collections.abc import Sequence

import torch

from vlmq_vllm.offline.data.token_kinds import ANSWER

IGNORED = -100  # label of a token that is not to be predicted


def answer_labels(ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Labels int64 [B, T]: the ids [B, T] of tokens of kind ANSWER, IGNORED elsewhere."""
    return torch.where(kinds == ANSWER, ids, IGNORED)


def count_labels(labels: Sequence[torch.Tensor]) -> int:
    """Tokens that are predicted; nothing comes before the first of a sample."""
    return sum(int((one[:, 1:] != IGNORED).sum()) for one in labels)
