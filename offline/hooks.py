"""Hooks on modules for a while: linears whose inputs are rounded as they will be when the model is served."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from vlmq_vllm.activations import round_tokens


@contextmanager
def rounding_inputs(linears: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Round what these modules get, per token to 8 bits, for a while. Other hooks on them see rounded inputs."""
    with removing([linear.register_forward_pre_hook(_round, prepend=True) for linear in linears]):
        yield


@contextmanager
def removing(handles: list) -> Iterator[None]:
    """Take the hooks away again, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def straight_through(x: torch.Tensor) -> torch.Tensor:
    """Rounded x with the gradient of x."""
    return x + (round_tokens(x) - x).detach()


def _round(module: torch.nn.Module, inputs: tuple) -> tuple:
    x, *rest = inputs
    return straight_through(x), *rest
