"""The contract of everything that weighs tokens: VLMQ, MBQ's modality weights and QIG are called in the same way.

A TokenWeigher is called with a layer, its index, the streams before it with full-precision and with quantised weights
so far, and a context manager that puts the layer's own rounded weights in place. It gives token weights of each linear
that it weighs, float32 [N] for each batch of N tokens, and by linear what the report says of them. Linears that are
given the very same list, not an equal one, share one Hessian and are solved as one (`methods/gptq/problem.py`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from vlmq_vllm.offline.model.streams import Stream

Rounded = Callable[[], AbstractContextManager]  # `with rounding():` the layer has its own rounded weights
Weights = dict[str, list[torch.Tensor]]  # by linear, [N] per batch
TokenWeigher = Callable[
    [torch.nn.Module, int, list[Stream], list[Stream], Rounded],
    tuple[Weights, dict[str, str]],
]
