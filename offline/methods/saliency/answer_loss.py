"""Computes the answers' cross-entropy and its gradients, with one decoder layer at a time in memory.

    L = - 1/n sum over answer tokens t of log p(id_t | tokens before t)        in nats, over all samples

Logits are those of the final norm and lm_head (the input embeddings where the two are tied), soft-capped where
config.json has a final_logit_softcapping. The way forward keeps the input of every layer in the host's memory; the way
back loads the layers once more from the last to the first and runs each again with gradients. Batches go there and back
in chunks whose kept inputs stay below a limit; a chunk costs two readings of the decoder's weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.token_kinds import IGNORED, count_labels
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream, hidden_of

LIMIT = 4 << 30  # bytes of layers' inputs in the host's memory
ROWS = 512  # tokens whose logits are in memory at once

Visit = Callable[[int, str, int, torch.Tensor], None]


@torch.no_grad()
def backward(
    source: Source,
    streams: list[Stream],
    labels: list[torch.Tensor],
    device: torch.device,
    linears: Sequence[str] = (),
    visit: Visit | None = None,
    total: int | None = None,
    limit: int = LIMIT,
) -> tuple[float, list[torch.Tensor]]:
    """L and its gradients at the streams' hidden [B, T, d] before the first layer. The streams are left as given.

    labels: per stream int64 [B, T], a token's own id at its place, IGNORED where it is not to be predicted.
    visit(layer's number, name, stream's number, gradient [B T, O]) sees the gradient at the outputs of `linears`, names
    of linears or other modules of every layer, from the last layer to the first. Streams without a label have zero
    gradients and are not visited. total: n, if other processes have more labels. Raises QuantizeError without a label.
    """
    total = count_labels(labels) if total is None else total
    if not total:
        raise QuantizeError("no calibration sample has an answer to predict; give chats in which the assistant answers")
    loss = 0.0
    gradients = [torch.zeros_like(stream.hidden) for stream in streams]
    for numbers in _chunks(source, streams, labels, limit):
        chunk = [streams[i] for i in numbers]
        kept = _forward(source, chunk, device)
        part, found = _head(source, kept.pop(), [labels[i] for i in numbers], device, total)
        loss += part
        for index, name, i, gradient in _back(source, chunk, kept, found, device, linears if visit else ()):
            if visit:
                visit(index, name, numbers[i], gradient)
        for i, gradient in zip(numbers, found, strict=True):
            gradients[i] = gradient.to(streams[i].hidden)
    return loss, gradients


def _chunks(source: Source, streams: list[Stream], labels: list[torch.Tensor], limit: int) -> Iterator[list[int]]:
    """Numbers of the streams with labels, in chunks of at most `limit` bytes of kept inputs or of one stream."""
    chunk: list[int] = []
    size = 0
    for i, stream in enumerate(streams):
        if not count_labels(labels[i : i + 1]):
            continue
        own = 4 * stream.hidden.numel() * (len(source.layers()) + 1)
        if chunk and size + own > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += own
    if chunk:
        yield chunk


def _at(stream: Stream, hidden: torch.Tensor, device: torch.device) -> Stream:
    """The stream with other hidden states, cut off from where they come from."""
    return replace(stream, hidden=hidden.detach().to(device))


def _forward(source: Source, streams: list[Stream], device: torch.device) -> list[list[torch.Tensor]]:
    """By layer and stream the layers' inputs, and after them the last one's outputs."""
    kept = [[stream.hidden.cpu() for stream in streams]]
    for index in range(len(source.layers())):
        name = f"{source.family.layers}.{index}"
        layer = source.materialise(name, device)
        pairs = zip(streams, kept[-1], strict=True)
        kept.append([_at(stream, hidden, device).run(layer, index).cpu() for stream, hidden in pairs])
        source.release(name)
    return kept


def _head(
    source: Source, outputs: list[torch.Tensor], labels: list[torch.Tensor], device: torch.device, total: int
) -> tuple[float, list[torch.Tensor]]:
    """The streams' share of L, and its gradients at the last layer's outputs [B, T, d]."""
    name = f"{source.family.layers.rpartition('.')[0]}.norm"
    norm = source.materialise(name, device)
    tied = "lm_head.weight" not in source.places
    weight = source.parameter(f"{source.family.embed}.weight" if tied else "lm_head.weight").to(device, torch.float32)
    cap = getattr(source.parsed.get_text_config(), "final_logit_softcapping", None)
    loss, gradients = 0.0, []
    for hidden, ids in zip(outputs, labels, strict=True):
        hidden, targets = hidden.detach().to(device).requires_grad_(), ids[:, 1:].to(device)
        wanted = targets != IGNORED
        with torch.enable_grad():
            rows = norm(hidden)[:, :-1][wanted]
        part, gradient = _cross_entropy(rows.detach(), targets[wanted], weight, cap)
        loss += part / total
        gradients.append(torch.autograd.grad(rows, hidden, gradient / total)[0])
    source.release(name)
    return loss, gradients


def _cross_entropy(
    rows: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, cap: float | None
) -> tuple[float, torch.Tensor]:
    """Summed over rows [n, d] with target ids [n] and a head [vocabulary, d]; and the gradient [n, d]."""
    loss, gradients = 0.0, []
    for part, ids in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
        part = part.requires_grad_()
        with torch.enable_grad():
            logits = part @ weight.T
            logits = cap * torch.tanh(logits / cap) if cap else logits
            value = F.cross_entropy(logits, ids, reduction="sum")
        gradients += torch.autograd.grad(value, part)
        loss += float(value)
    return loss, torch.cat(gradients)


def _back(
    source: Source,
    streams: list[Stream],
    kept: list[list[torch.Tensor]],
    gradients: list[torch.Tensor],
    device: torch.device,
    names: Sequence[str],
) -> Iterator[tuple[int, str, int, torch.Tensor]]:
    """From the last layer to the first: `gradients`, at the outputs, become those at the inputs; `kept` is used up.

    Gives layer's number, name, stream's number and gradient [B T, O] at the output of each of `names`.
    """
    while kept:
        inputs, index = kept.pop(), len(kept)
        name = f"{source.family.layers}.{index}"
        layer = source.materialise(name, device)
        outputs: dict[str, torch.Tensor] = {}
        handles = [
            layer.get_submodule(inner).register_forward_hook(
                lambda m, args, out, inner=inner, outputs=outputs: outputs.update({inner: hidden_of(out)})
            )
            for inner in names
        ]
        with removing(handles):
            for i, stream in enumerate(streams):
                here = _at(stream, inputs[i], device)
                here.hidden.requires_grad_()
                with torch.enable_grad():
                    out = here.run(layer, index)
                wanted = [here.hidden, *(outputs[inner] for inner in names)]
                found = torch.autograd.grad(out, wanted, gradients[i], materialize_grads=True)
                gradients[i] = found[0]
                for inner, gradient in zip(names, found[1:], strict=True):
                    yield index, inner, i, gradient.flatten(0, -2)
        source.release(name)
