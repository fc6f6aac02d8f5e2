"""Takes streams through the whole decoder and gradients back, with one layer's weights in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream, noting


@torch.no_grad()
def forward(source: Source, streams: list[Stream], device: torch.device) -> list[list[torch.Tensor]]:
    """By layer and stream the inputs [B, T, d], and after them the last layer's outputs, in the host's memory; the
    streams stay as they are."""
    kept = [[stream.hidden.detach().cpu() for stream in streams]]
    for index in range(len(source.layers())):
        with source.loaded(f"{source.family.layers}.{index}", device) as layer:
            pairs = zip(streams, kept[-1], strict=True)
            kept.append([replace(stream, hidden=x.to(device)).run(layer, index).cpu() for stream, x in pairs])
    return kept


def backward(
    source: Source,
    streams: list[Stream],
    inputs: list[list[torch.Tensor]],
    gradients: list[torch.Tensor],
    device: torch.device,
    names: Sequence[str] = (),
) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """From the last layer to the first: `gradients`, by stream at a layer's output, become those at its input.

    inputs: by layer and stream, as `forward` gives them; used up. After each layer and stream come their numbers and
    the gradients [B T, O] at the outputs of the layer's modules `names`; what is then added to `gradients` flows on.
    """
    while inputs:
        hidden, index = inputs.pop(), len(inputs)
        with (
            source.loaded(f"{source.family.layers}.{index}", device) as layer,
            noting(layer, names, lambda args, kwargs, out: out) as outputs,
        ):
            for i, stream in enumerate(streams):
                start = hidden[i].detach().to(device).requires_grad_()
                with torch.enable_grad():
                    out = replace(stream, hidden=start).run(layer, index)
                wanted = [start, *(outputs[name] for name in names)]
                gradients[i], *found = torch.autograd.grad(out, wanted, gradients[i], materialize_grads=True)
                yield index, i, {name: own.flatten(0, -2) for name, own in zip(names, found, strict=True)}
