"""A stream is one batch of samples on its way through a stack of layers, run one layer at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from vlmq_vllm.offline.model.hooks import removing, rounding_inputs

Call = tuple[tuple, dict]  # args and kwargs of a module
Note = TypeVar("Note")


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Stream:
    """One batch of samples of equal length, and what was caught from the model's own forward pass (`capture.py`).

    hidden: [B, T, d] float32 (in a vision tower whatever its blocks pass on). calls: for every layer its arguments
    besides hidden. terms: what the model adds to the output of a layer, by the layer's number. rounded: linears whose
    inputs are rounded per token wherever this stream goes through them.
    """

    hidden: torch.Tensor
    calls: list[Call]
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

    def call_of(self, layer: torch.nn.Module, index: int, name: str) -> Call:
        """With what the layer calls its module `name`; the layer runs no further. Gradients flow. A linear's input is
        as it comes: not rounded, even where the stream rounds those of other linears."""
        caught: list[Call] = []
        asked = layer.get_submodule(name)

        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append((args, kwargs))
            raise Stop

        with suppress(Stop), removing([asked.register_forward_pre_hook(hook, with_kwargs=True)]):
            replace(self, rounded=self.rounded - {asked}).call(layer, index)
        return caught[0]


def hidden_of(out: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states among what a layer returns."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def noting(
    layer: torch.nn.Module, names: Iterable[str], note: Callable[[tuple, dict, torch.Tensor], Note]
) -> Iterator[dict[str, Note]]:
    """While it runs, note(args, kwargs, output) of each of the layer's modules `names`, in the order in which they end;
    of one that runs twice the latter."""
    notes: dict[str, Note] = {}

    def hooked(name: str) -> RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, out: torch.Tensor | tuple) -> None:
            notes[name] = note(args, kwargs, hidden_of(out))

        return layer.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    with removing([hooked(name) for name in names]):
        yield notes
