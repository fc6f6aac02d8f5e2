"""Catches the inputs of a stack of layers from the model's own forward pass, and proves that replaying them is exact.

What every layer is called with (hidden states of the first, positions, masks, and what the model adds between layers,
as DeepStack does) is caught, never rebuilt: while inputs are captured the layers are replaced by stubs that take down
their arguments and answer with zeros, so that whatever reaches the next one is what the model itself adds.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.model.hooks import replacing, rounding_inputs
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stop, Stream, hidden_of

CACHE = ("past_key_values", "cache", "use_cache")


@torch.no_grad()
def capture(
    source: Source,
    stack: str,
    batches: Iterable[dict],
    device: torch.device,
    quantized: bool = False,
    rounded: frozenset[torch.nn.Module] = frozenset(),
) -> list[Stream]:
    """The streams, of those `batches` that reach it, at the first layer of the ModuleList `stack` (or at a connector).
    quantized: the vision tower and connectors as far as they have been quantised. rounded: as in Stream, on the way to
    the stack as well."""
    with source.before_decoder(device, quantized), rounding_inputs(rounded):
        found = [catch(source, stack, batch, device) for batch in batches]
    return [replace(stream, rounded=rounded) for stream in found if stream]


@torch.no_grad()
def check_replay(source: Source, batch: dict, device: torch.device) -> None:
    """Compare the streamed decoder with the model's own forward on one batch; raises at the first layer that differs.

    Both run in float32 on the same kernels, so that 1e-4 of the layer's largest value is far above rounding.
    """
    with source.before_decoder(device):
        stream = catch(source, source.family.layers, batch, device)
        if stream is None:
            raise QuantizeError(f"a forward pass does not reach {source.family.layers}; please report it")
        layers = source.layers()

        def checked(index: int, own: Callable) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                name = f"{source.family.layers}.{index}"
                source.materialise(name, device)
                if args:
                    _compare(f"what reaches {name}", stream.hidden, args[0])
                out = own(*args, **kwargs)
                rest, caught = stream.calls[index]
                replayed = hidden_of(own(stream.hidden, *rest, **caught))
                stream.hidden = replayed + stream.terms.get(index, 0)
                source.release(name)
                _compare(name, replayed, hidden_of(out))
                if index + 1 == len(layers):
                    raise Stop
                return out

            return forward

        with suppress(Stop), replacing({layer: checked(i, layer.forward) for i, layer in enumerate(layers)}):
            source.model(**_to(batch, device), use_cache=False)


def _compare(name: str, replayed: torch.Tensor, real: torch.Tensor) -> None:
    error = float((replayed - real).abs().max() / real.abs().max())
    if not error < 1e-4:
        raise QuantizeError(
            f"replaying {name} differs from the model's own forward by {error:.1e} of its largest value; "
            "this model passes something between its layers that vlmq does not know: please report it"
        )


def catch(source: Source, stack: str, batch: dict, device: torch.device) -> Stream | None:
    """Run the model with stubs in the place of `stack`'s layers; it stops where the decoder has been seen."""
    found: list[Stream] = []
    whole = source.model.get_submodule(stack)
    layers = list(whole) if isinstance(whole, torch.nn.ModuleList) else [whole]
    last = None if stack == source.family.blocks else layers[-1]

    def stub(index: int, layer: torch.nn.Module) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            call = (tuple(rest), {name: value for name, value in kwargs.items() if name not in CACHE})
            if not found:
                found.append(Stream(hidden, []))
            elif hidden.any():
                found[0].terms[index - 1] = hidden
            found[0].calls.append(call)
            if layer is last:
                raise Stop
            return torch.zeros_like(hidden)

        return forward

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    stubs = {layer: stub(index, layer) for index, layer in enumerate(layers)}
    stubs.setdefault(source.layers()[0], stop)  # unless it is in the stack
    with suppress(Stop), replacing(stubs):
        source.model(**_to(batch, device), use_cache=False)
    return found[0] if found else None


def _to(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
