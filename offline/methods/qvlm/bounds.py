"""Learns the clipping bounds of the vision encoder: Q-VLM's visual encoder optimisation (2410.08119, eq. 8 to 10).

Weights stay as they are; factors on the bounds of their ranges are found by Adam, with the rounding's gradient straight
through, for a small

    L = L_reg + l1 L_ent + l2 (L_v + eta E),

L_reg: the answer's cross-entropy in nats; L_ent and E: `decoder.py`; L_v = || x^0 - x_r^0 || / || x_r^0 ||, the error
of the encoder's output. Everything is measured at the decoder's input x^0, after the connector; the text's embeddings
there are equal in both and add nothing.

What the paper leaves open: l1, l2 and eta, the optimiser and its rate (`Hyperparameters`: guesses that were not tuned);
the ranges that are varied: those of every group of weights. One step per batch, in order, as the caller made them (the
paper: 8 pairs of 64, 10 epochs). Terms that a model adds between layers of its decoder (DeepStack) pass no gradient on.

Every step reads the whole decoder from its files five times (twice for L_reg, three times for L_ent and E), and L_ent's
ranges take once more per batch. Only samples of equal length share a batch: with 10 epochs 8 batches cost 408 readings,
128 samples of unequal lengths 6528. This is for small decoders, or for few samples.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn import functional as F

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.inputs import has_vision
from vlmq_vllm.offline.data.token_kinds import count_labels
from vlmq_vllm.offline.methods.qvlm.decoder import effect_of, states, widened
from vlmq_vllm.offline.methods.qvlm.entropy import Range
from vlmq_vllm.offline.methods.qvlm.ranges import Ranges
from vlmq_vllm.offline.methods.saliency import answer_loss
from vlmq_vllm.offline.model.capture import catch
from vlmq_vllm.offline.model.hooks import replacing
from vlmq_vllm.offline.model.layers import linear_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

LEAST = 0.05  # of a factor; at 0 a range would be empty


@dataclass(frozen=True)
class Hyperparameters:
    """l1 (`entropy`), l2 (`error`) and eta of the objective, Adam's rate, epochs, and bits of the entropy's grid."""

    entropy: float = 0.1
    error: float = 1.0
    eta: float = 1.0
    rate: float = 0.005
    epochs: int = 10
    bits: int = 4


class Loss(NamedTuple):
    """L and its terms, of a batch or means over the batches of an epoch."""

    total: float
    answer: float
    entropy: float
    encoder: float
    decoder: float


@dataclass(frozen=True)
class Clipped:
    """A linear whose bounds are learnt. factors: leaf tensors, 1 at the start. weight: the rounded weight [O, I] as a
    function of them."""

    factors: list[torch.Tensor]
    weight: Callable[[], torch.Tensor]

    def output(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Of the rounded linear, [..., O] for x [..., I]."""
        return F.linear(x, self.weight(), bias)


def clip_groups(weight: torch.Tensor, ranges: Ranges) -> Clipped:
    """One factor [O, G] per group of a weight [O, I] that will be `ranges.rounded(weight, factor)`."""
    factor = torch.ones_like(ranges.scale, dtype=torch.float32).requires_grad_()
    group, top = ranges.format.group_of(weight.shape[1], weight.device), ranges.format.levels - 1
    zero = ranges.format.middle if ranges.zero is None else ranges.zero.float()[:, group]

    def rounded() -> torch.Tensor:
        exact = ranges.scale.float() * factor
        scale = (exact + (ranges.scaled(factor.detach()).float() - exact).detach())[:, group]
        position = (weight / scale + zero).clamp(0, top)
        return scale * (position + (position.round() - position).detach() - zero)

    return Clipped([factor], rounded)


def clipping(model: torch.nn.Module, clipped: dict[str, Clipped]) -> AbstractContextManager:
    """The model with these linears rounded for a while, differentiably."""
    linears = {name: linear_of(model, name) for name in clipped}
    return replacing({linear: partial(clipped[name].output, bias=linear.bias) for name, linear in linears.items()})


def teaches(batch: dict, label: torch.Tensor) -> bool:
    """Whether a batch has both a picture and an answer that is predicted."""
    return has_vision(batch) and count_labels([label]) > 0


def learn_bounds(
    source: Source,
    batches: list[dict],
    labels: list[torch.Tensor],
    clipped: dict[str, Clipped],
    device: torch.device,
    hyper: Hyperparameters,
) -> list[Loss]:
    """Learn the factors of `clipped` (by in-memory name), in place; the losses of each epoch.

    batches: inputs of the model; labels: int64 [B, T], -100 where nothing is predicted. Batches that teach nothing are
    passed over. Raises QuantizeError when none is left.
    """
    pairs = [pair for pair in zip(batches, labels, strict=True) if teaches(*pair)]
    if not pairs:
        raise QuantizeError(
            "no calibration sample has both a picture and an answer, which the vision encoder's bounds are learnt "
            "from; add such samples"
        )
    factors = [factor for own in clipped.values() for factor in own.factors]
    adam = torch.optim.Adam(factors, hyper.rate)
    history = []
    with source.before_decoder(device):
        ends: list[tuple[torch.Tensor, torch.Tensor]] = []
        ranges: list[Range] = []
        for batch, _ in pairs:
            with torch.no_grad():
                found = states(source, _before_decoder(source, batch, device), device)
            ends.append((found[0], found[-1]))
            ranges = widened(ranges, found)
        for _ in range(hyper.epochs):
            losses = []
            for (batch, label), aims in zip(pairs, ends, strict=True):
                adam.zero_grad()
                with clipping(source.model, clipped), torch.enable_grad():
                    stream = _before_decoder(source, batch, device)
                losses.append(_descend(source, stream, label, aims, ranges, device, hyper))
                adam.step()
                for factor in factors:
                    factor.data.clamp_(min=LEAST)
            history.append(Loss(*map(fmean, zip(*losses, strict=True))))
    return history


def _before_decoder(source: Source, batch: dict, device: torch.device) -> Stream:
    """A batch as it enters the decoder."""
    stream = catch(source, source.family.layers, batch, device)
    assert stream is not None, "every batch reaches the decoder"
    return stream


def _descend(
    source: Source,
    stream: Stream,
    label: torch.Tensor,
    aims: tuple[torch.Tensor, torch.Tensor],
    ranges: list[Range],
    device: torch.device,
    hyper: Hyperparameters,
) -> Loss:
    """The loss of one batch; its gradients go to the factors. aims: x_r^0 and x_r^n."""
    entered, left = aims
    hidden = stream.hidden
    cut = replace(stream, hidden=hidden.detach(), terms={k: term.detach() for k, term in stream.terms.items()})
    reg, (gradient,) = answer_loss.backward(source, [cut], [label], device)
    effect = effect_of(source, cut, left, ranges, hyper.bits, device)
    gradient = gradient + hyper.entropy * effect.entropy_gradient
    gradient = gradient + hyper.error * hyper.eta * effect.error_gradient
    with torch.enable_grad():
        encoder = (hidden - entered).norm() / entered.norm()
        (hyper.error * encoder + (hidden * gradient).sum()).backward()
    value, error = encoder.item(), effect.error
    total = reg + hyper.entropy * effect.entropy + hyper.error * (value + hyper.eta * error)
    return Loss(total, reg, effect.entropy, value, error)
