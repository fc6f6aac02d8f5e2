"""Running the decoder one layer at a time on inputs that the model's own forward pass prepared.

Hidden states at the first layer, positions and masks are caught from the real forward, never rebuilt: a hook takes what
the model hands to its first decoder layer and stops there. `check_replay` proves on one sample that layer after layer
on these inputs is what the real forward computes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.source import Source


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Stream:
    """Hidden states [1, T, d] float32 of one sample and the arguments that every decoder layer gets with them."""

    hidden: torch.Tensor
    kwargs: dict


@torch.no_grad()
def capture(source: Source, samples: Iterable[dict[str, torch.Tensor]], device: torch.device) -> list[Stream]:
    """The streams at the first decoder layer; vision tower and embeddings are in memory only meanwhile."""
    with _front(source, device):
        return [_catch(source, inputs, device) for inputs in samples]


def run(layer: torch.nn.Module, stream: Stream) -> torch.Tensor:
    """The layer's output [1, T, d]."""
    return _tensor(layer(stream.hidden, **stream.kwargs))


def visit_inputs(
    layer: torch.nn.Module, names: tuple[str, ...], stream: Stream, visit: Callable[[str, torch.Tensor], None]
) -> None:
    """Run the layer as far as its linears `names` and call visit(name, inputs [T, I]) for each."""
    left = set(names)

    def hook(name: str, inputs: tuple) -> None:
        visit(name, inputs[0].flatten(0, -2))
        left.discard(name)
        if not left:
            raise _Stop

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda m, inputs, name=name: hook(name, inputs))
        for name in names
    ]
    with suppress(_Stop), removing(handles):
        run(layer, stream)


@torch.no_grad()
def check_replay(source: Source, inputs: dict[str, torch.Tensor], device: torch.device) -> None:
    """Compare the streamed decoder with the model's own forward on one sample; raises at the first layer that differs.

    Both run in float32 on the same kernels, so that 1e-4 of the layer's largest value is far above rounding.
    """
    with _front(source, device):
        stream = _catch(source, inputs, device)
        layers = source.layers()
        names = {layer: f"{source.family.layers}.{i}" for i, layer in enumerate(layers)}

        def load(layer, args):
            source.materialise(names[layer], device, torch.float32)

        def compare(layer, args, out):
            stream.hidden = _tensor(layer.forward(stream.hidden, **stream.kwargs))  # past the hooks, that is this one
            source.release(names[layer])
            _compare(names[layer], stream.hidden, _tensor(out))
            if layer is layers[-1]:
                raise _Stop

        handles = [layer.register_forward_pre_hook(load) for layer in layers]
        handles += [layer.register_forward_hook(compare) for layer in layers]
        with suppress(_Stop), removing(handles):
            source.model(**_to(inputs, device), use_cache=False)


def _compare(name: str, replayed: torch.Tensor, real: torch.Tensor) -> None:
    error = float((replayed - real).abs().max() / real.abs().max())
    if not error < 1e-4:
        raise QuantizeError(
            f"replaying {name} differs from the model's own forward by {error:.1e} of its largest value; "
            "this model passes something between its layers that vlmq does not know: please report it"
        )


@contextmanager
def _front(source: Source, device: torch.device) -> Iterator[None]:
    """Vision tower and embeddings in memory."""
    for name in source.family.front:
        source.materialise(name, device, torch.float32)
    try:
        yield
    finally:
        for name in source.family.front:
            source.release(name)


@contextmanager
def removing(handles: list) -> Iterator[None]:
    """Take the hooks away again, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _catch(source: Source, inputs: dict[str, torch.Tensor], device: torch.device) -> Stream:
    caught: list[Stream] = []

    def hook(layer, args, kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        hidden = args[0] if args else kwargs.pop("hidden_states")
        caught.append(Stream(hidden, kwargs))
        raise _Stop

    with suppress(_Stop), removing([source.layers()[0].register_forward_pre_hook(hook, with_kwargs=True)]):
        source.model(**_to(inputs, device), use_cache=False)
    return caught[0]


def _tensor(out: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states among what a decoder layer returns."""
    return out[0] if isinstance(out, tuple) else out


def _to(inputs: dict, device: torch.device) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
