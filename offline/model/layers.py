"""Names the linears and parameters of a layer, and puts others in their places."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def linears_of(layer: torch.nn.Module) -> list[str]:
    """Names of the linears in a layer, as they are registered."""
    return [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]


def weights_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights [O, I] of a layer's linears, as they are now."""
    return {name: layer.get_submodule(name).weight for name in linears_of(layer)}


def parameters_of(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All parameters of a layer by their names in it, as they are now."""
    return dict(layer.named_parameters())


def is_clipped(linear: str) -> bool:
    """Whether AWQ's search for clipped ranges is for this linear: not for q and k, whose outputs meet in a product, and
    with them not for a tower's fused `qkv`, as AWQ's code leaves out its `Wqkv`."""
    return linear.rpartition(".")[2] not in ("q_proj", "k_proj", "qkv")


def put(layer: torch.nn.Module, linear: str, weight: torch.Tensor) -> None:
    """Give a linear another weight; the one that it had is not changed."""
    if not isinstance(weight, torch.nn.Parameter):
        weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.get_submodule(linear).weight = weight


def set_parameter(layer: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a layer another parameter `name`; the one that it had is not changed."""
    owner, _, leaf = name.rpartition(".")
    if not isinstance(value, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=False)
    layer.get_submodule(owner).register_parameter(leaf, value)


@contextmanager
def holding(layer: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
    """The layer with other weights of its linears for a while."""
    with with_parameters(layer, {f"{linear}.weight": weight for linear, weight in weights.items()}):
        yield layer


@contextmanager
def with_parameters(layer: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
    """The layer with other parameters, by their names in it, for a while."""
    before = {name: layer.get_parameter(name) for name in parameters}
    for name, value in parameters.items():
        set_parameter(layer, name, value)
    try:
        yield layer
    finally:
        for name, value in before.items():
            set_parameter(layer, name, value)
