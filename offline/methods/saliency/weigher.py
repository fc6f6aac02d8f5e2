"""The contract of everything that weighs tokens: VLMQ, MBQ's modality weights and QIG are called in the same way."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from vlmq_vllm.offline.model.streams import Stream

Rounded = Callable[[], AbstractContextManager]  # `with rounding():` the layer has its own rounded weights
Weights = dict[str, list[torch.Tensor]]  # by linear, [N] per batch


class TokenWeigher(Protocol):
    """Gives the tokens that reach a layer's linears their weights."""

    def __call__(
        self,
        layer: torch.nn.Module,
        index: int,
        full: list[Stream],
        quantized: list[Stream],
        rounding: Rounded,
    ) -> tuple[Weights, dict[str, str]]:
        """Token weights of each weighted linear of layer `index`, and by linear what the report says of them.

        full, quantized: the streams before the layer, with full-precision and with quantised weights so far. Weights
        are float32 [N] for each batch of N tokens. Linears that are given the very same list share one Hessian and
        are solved as one problem (`methods/gptq/problem.py`); equal lists that are two objects are not.
        """
        ...
