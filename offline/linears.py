"""The linears of a layer: their names, and other weights in their places."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def linears_of(layer: torch.nn.Module) -> list[str]:
    """Names of the linears in a layer, as they are registered."""
    return [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]


def weights_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights [O, I] of a layer's linears, as they are now."""
    return {name: layer.get_submodule(name).weight for name in linears_of(layer)}


def put(layer: torch.nn.Module, linear: str, weight: torch.Tensor) -> None:
    """Give a linear another weight; the one that it had is not changed."""
    if not isinstance(weight, torch.nn.Parameter):
        weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.get_submodule(linear).weight = weight


@contextmanager
def holding(layer: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
    """The layer with other weights of its linears for a while."""
    before = {linear: layer.get_submodule(linear).weight for linear in weights}
    for linear, weight in weights.items():
        put(layer, linear, weight)
    try:
        yield layer
    finally:
        for linear, weight in before.items():
            put(layer, linear, weight)
