"""Changes what modules do for a while, such as rounding a linear's inputs as they will be when the model is served."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.hooks import RemovableHandle

from vlmq_vllm.activations import round_tokens

InputRounding = Callable[[torch.Tensor], torch.Tensor]  # [.., I] to [.., I]


@contextmanager
def rounding_inputs(linears: Iterable[torch.nn.Module], rounding: InputRounding = round_tokens) -> Iterator[None]:
    """Round what these modules get, as it will be when they are served, for a while; gradients pass as if it were not.
    Other hooks on them see rounded inputs."""

    def hook(module: torch.nn.Module, inputs: tuple) -> tuple:
        x, *rest = inputs
        return x + (rounding(x) - x).detach(), *rest

    with removing([linear.register_forward_pre_hook(hook, prepend=True) for linear in linears]):
        yield


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take the hooks away again, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replacing(forwards: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Other forward functions for these modules."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
