"""Learns clipping bounds where inputs are rounded, too: a linear with factors on its rows' ranges and on its inputs'.

`learn_bounds` of `offline/methods/qvlm/bounds.py` learns them as it does those of served weights. An input has one
factor on the lower and one on the upper bound of all its tokens.
"""

from dataclasses import dataclass

import torch

from benchmarks.qvlm_fake.fake import Rounder, by_token, fake
from vlmq_vllm.offline.methods.qvlm.bounds import Clipped
from vlmq_vllm.offline.methods.qvlm.entropy import Range


@dataclass(frozen=True)
class ClippedInputs(Clipped):
    """inputs: how the linear's input is rounded, as a function of the factors."""

    inputs: Rounder

    def output(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super().output(self.inputs(x), bias)


def clip_rows(weight: torch.Tensor, bounds: Range, bits: int, share: float) -> ClippedInputs:
    """Factors [2, O, 1] on the bounds of a weight's rows, and [2] on those of its input's tokens (`by_token`)."""
    rows = torch.ones(2, len(weight), 1, device=weight.device).requires_grad_()
    tokens = torch.ones(2, device=weight.device).requires_grad_()
    low, high = bounds

    def rounded() -> torch.Tensor:
        return fake(weight, low * rows[0], high * rows[1], 1 << bits)

    return ClippedInputs([rows, tokens], rounded, by_token(share, 1 << bits, tokens))
