"""Computes the answers' cross-entropy and its gradients, with one decoder layer at a time in memory.

    L = - 1/n sum over answer tokens t of log p(id_t | tokens before t)        in nats, over all samples

Logits are those of the final norm and lm_head (the input embeddings where the two are tied), soft-capped where
config.json has a final_logit_softcapping. Batches go there and back in chunks whose kept inputs stay below a limit; a
chunk costs two readings of the decoder's weights.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.token_kinds import IGNORED, count_labels
from vlmq_vllm.offline.model import passes
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

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
    visit: Visit = lambda layer, name, stream, gradient: None,
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
        kept = passes.forward(source, chunk, device)
        part, found = _head(source, kept.pop(), [labels[i] for i in numbers], device, total)
        loss += part
        for index, i, inner in passes.backward(source, chunk, kept, found, device, linears):
            for name, gradient in inner.items():
                visit(index, name, numbers[i], gradient)
        for i, gradient in zip(numbers, found, strict=True):
            gradients[i] = gradient.to(streams[i].hidden)
    return loss, gradients


def _chunks(source: Source, streams: list[Stream], labels: list[torch.Tensor], limit: int) -> list[list[int]]:
    """Numbers of the streams with labels, in chunks of at most `limit` bytes of kept inputs or of one stream."""
    chunks: list[list[int]] = []
    size = limit
    for i, stream in enumerate(streams):
        if count_labels(labels[i : i + 1]):
            own = 4 * stream.hidden.numel() * (len(source.layers()) + 1)
            size += own
            if size > limit:
                chunks.append([])
                size = own
            chunks[-1].append(i)
    return chunks


def _head(
    source: Source, outputs: list[torch.Tensor], labels: list[torch.Tensor], device: torch.device, total: int
) -> tuple[float, list[torch.Tensor]]:
    """The streams' share of L, and its gradients at the last layer's outputs [B, T, d]."""
    tied = "lm_head.weight" not in source.places
    weight = source.parameter(f"{source.family.embed}.weight" if tied else "lm_head.weight").to(device, torch.float32)
    cap = getattr(source.parsed.get_text_config(), "final_logit_softcapping", None)
    loss, gradients = 0.0, []
    with source.loaded(f"{source.family.layers.rpartition('.')[0]}.norm", device) as norm:
        for hidden, ids in zip(outputs, labels, strict=True):
            hidden, targets = hidden.detach().to(device).requires_grad_(), ids[:, 1:].to(device)
            wanted = targets != IGNORED
            with torch.enable_grad():
                rows = norm(hidden)[:, :-1][wanted]
            part, gradient = _cross_entropy(rows.detach(), targets[wanted], weight, cap)
            loss += part / total
            gradients.append(torch.autograd.grad(rows, hidden, gradient / total)[0])
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
