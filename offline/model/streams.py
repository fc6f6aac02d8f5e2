"""A stream is one batch of samples on its way through a stack of layers, run one layer at a time.

What every layer is called with was caught from the model's own forward pass (`capture.py`).
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from vlmq_vllm.offline.model.hooks import removing, rounding_inputs


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Stream:
    """One batch of samples of equal length on its way through a stack of layers.

    hidden: [B, T, d] float32 (in a vision tower whatever its blocks pass on). calls: for every layer its arguments
    besides hidden. terms: what the model adds to the output of a layer, by the layer's number. rounded: linears whose
    inputs are rounded per token wherever this stream goes through them.
    """

    hidden: torch.Tensor
    calls: list[tuple[tuple, dict]]
    terms: dict[int, torch.Tensor] = field(default_factory=dict)
    rounded: frozenset[torch.nn.Module] = frozenset()

    def run(self, layer: torch.nn.Module, index: int) -> torch.Tensor:
        """What layer `index` makes of `hidden`, and the term that the model adds after it."""
        out = self.call(layer, index)
        return out + self.terms[index] if index in self.terms else out

    def call(self, layer: torch.nn.Module, index: int) -> torch.Tensor:
        """The output of layer `index` alone."""
        args, kwargs = self.calls[index]
        with rounding_inputs(module for module in layer.modules() if module in self.rounded):
            return hidden_of(layer(self.hidden, *args, **kwargs))

    def inputs_of(
        self, layer: torch.nn.Module, index: int, names: Iterable[str], visit: Callable[[str, torch.Tensor], None]
    ) -> None:
        """Run the layer as far as its linears `names` and call visit(name, inputs [N, I]) for each."""
        left = set(names)

        def hook(name: str, inputs: tuple) -> None:
            visit(name, inputs[0].flatten(0, -2))
            left.discard(name)
            if not left:
                raise Stop

        handles = [
            layer.get_submodule(name).register_forward_pre_hook(lambda m, inputs, name=name: hook(name, inputs))
            for name in tuple(left)
        ]
        with suppress(Stop), removing(handles):
            self.call(layer, index)

    def until(self, layer: torch.nn.Module, index: int, name: str) -> torch.Tensor:
        """The input of the layer's module `name`; the layer runs no further. Gradients flow."""
        caught = []

        def hook(module, inputs):
            caught.append(inputs[0])
            raise Stop

        with suppress(Stop), removing([layer.get_submodule(name).register_forward_pre_hook(hook)]):
            self.call(layer, index)
        return caught[0]


def hidden_of(out: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states among what a layer returns."""
    return out[0] if isinstance(out, tuple) else out
