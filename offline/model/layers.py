"""Names the linears and parameters of a layer, and puts others in their places."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch


def named_linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears in a layer by their names in it, as they are registered."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}


def linears_of(layer: torch.nn.Module) -> list[str]:
    """Names of the linears in a layer, as they are registered."""
    return list(named_linears(layer))


def linear_of(layer: torch.nn.Module, name: str) -> torch.nn.Linear:
    """The linear of that name in a layer."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear), f"{name} is no linear but a {type(linear).__name__}"
    return linear


def weights_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights [O, I] of a layer's linears, as they are now."""
    return {name: linear.weight for name, linear in named_linears(layer).items()}


def is_clipped(linear: str) -> bool:
    """Whether AWQ's search for clipped ranges is for this linear: not for q and k, whose outputs meet in a product, and
    with them not for a tower's fused `qkv`, as AWQ's code leaves out its `Wqkv`."""
    return linear.rpartition(".")[2] not in ("q_proj", "k_proj", "qkv")


def called(model: torch.nn.Module, root: str) -> list[str]:
    """A connector's modules that are called one by one: those of the list `root`, or the module itself."""
    module = model.get_submodule(root)
    return [f"{root}.{i}" for i in range(len(module))] if isinstance(module, torch.nn.ModuleList) else [root]


def put(layer: torch.nn.Module, linear: str, weight: torch.Tensor) -> None:
    """Give a linear another weight; the one that it had is not changed."""
    set_parameter(layer, f"{linear}.weight", weight)


def set_parameter(layer: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a layer another parameter `name`; the one that it had is not changed."""
    owner, _, leaf = name.rpartition(".")
    if not isinstance(value, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=False)
    layer.get_submodule(owner).register_parameter(leaf, value)


def move_buffers(module: torch.nn.Module, device: torch.device, without: str = "") -> None:
    """Put a module's buffers on a device, but for those of its part `without`."""
    for name, buffer in list(module.named_buffers()):
        if not (without and name.startswith(f"{without}.")):
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def holding(layer: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> AbstractContextManager:
    """The layer with other weights of its linears for a while."""
    return with_parameters(layer, {f"{linear}.weight": weight for linear, weight in weights.items()})


@contextmanager
def with_parameters(layer: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The layer with other parameters, by their names in it, for a while."""
    before = {name: layer.get_parameter(name) for name in parameters}
    for name, value in parameters.items():
        set_parameter(layer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            set_parameter(layer, name, value)
