"""Measures what an error of the vision encoder does in the decoder: two terms of Q-VLM's objective, with gradients.

A batch enters the full-precision decoder after a rounded encoder, with hidden states x^0 (the decoder's input) to x^n
(after its last layer); x_r are the same states after the full-precision encoder (2410.08119, equations 8 and 9):

    E = || x^n - x_r^n || / || x_r^n ||                                         the second half of L_err
    L_ent = sum_k j_k H(x^(k+1) | x^k),   j_k = || dE / dx^k || / sum_l || dE / dx^l ||

H is the conditional entropy D(k, k + 1) of `entropy.py`, on the grid that the full-precision states span. What the
paper leaves open, and one sign:

* equation 8 prints sum p log p, which minimising would raise; the text wants the entropy lowered, so L_ent is positive;
* the Jacobian's norms are taken at the rounded states, where E has a gradient, and count as constants; only their
  ratios are kept, and errors are relative, so that the hyperparameters do not depend on the model's scale;
* the decoder is not rounded yet when the encoder's bounds are found.
"""

from dataclasses import dataclass

import torch

from vlmq_vllm.offline.methods.qvlm.entropy import Range, channel_ranges, conditional_entropy, joint_table, sampled
from vlmq_vllm.offline.model import passes
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

BATCH_ELEMENTS = 1 << 18  # of each layer and batch that the entropy looks at


@dataclass(frozen=True)
class Effect:
    """E and L_ent of a batch, and their gradients at the decoder's input, like `stream.hidden`."""

    error: float
    entropy: float
    error_gradient: torch.Tensor
    entropy_gradient: torch.Tensor


@torch.no_grad()
def states(source: Source, stream: Stream, device: torch.device) -> list[torch.Tensor]:
    """x^0 to x^n [B, T, d] of a stream before the decoder, which stays as it is."""
    return [x.to(device) for (x,) in passes.forward(source, [stream], device)]


def widened(ranges: list[Range], found: list[torch.Tensor]) -> list[Range]:
    """`ranges` of every channel at each place between layers, [] for none yet, together with those of these states."""
    own = [channel_ranges([x]) for x in found]
    pairs = zip(ranges or own, own, strict=True)
    return [(torch.minimum(low, least), torch.maximum(high, most)) for (low, high), (least, most) in pairs]


def effect_of(
    source: Source, stream: Stream, target: torch.Tensor, ranges: list[Range], bits: int, device: torch.device
) -> Effect:
    """The two terms for a stream before the decoder. target: x_r^n; ranges: of x_r^0 to x_r^n."""
    found = states(source, stream, device)
    end = found[-1].requires_grad_()
    with torch.enable_grad():
        error = (end - target).norm() / target.norm()
    (last,) = torch.autograd.grad(error, end)
    by_error = _back(source, stream, found, [torch.zeros_like(x) for x in found[:-1]] + [last], device)
    norms = torch.stack([gradient.norm() for gradient in by_error[:-1]])
    shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
    entropy, own = _entropies(found, ranges, bits, shares)
    by_entropy = _back(source, stream, found, own, device)
    return Effect(error.item(), entropy, by_error[0], by_entropy[0])


def _entropies(
    found: list[torch.Tensor], ranges: list[Range], bits: int, shares: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """L_ent, and its gradients at every x^k as if they did not depend on each other."""
    entropy, gradients = 0.0, [torch.zeros_like(x) for x in found]
    for k, share in enumerate(shares):
        pair = [x.detach().requires_grad_() for x in found[k : k + 2]]
        with torch.enable_grad():
            before, after = (sampled([x], BATCH_ELEMENTS)[0] for x in pair)
            table = joint_table(before, after, ranges[k], ranges[k + 1], 1 << bits)
            value = share * conditional_entropy(table)
        for place, gradient in zip((k, k + 1), torch.autograd.grad(value, pair), strict=True):
            gradients[place] += gradient
        entropy += value.item()
    return entropy, gradients


def _back(
    source: Source, stream: Stream, found: list[torch.Tensor], own: list[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """The gradients at every x^k of a loss whose own gradients at each of them, through no layer, are `own`."""
    gradients, here = list(own), own[-1:]
    for index, _, _ in passes.backward(source, [stream], [[x] for x in found[:-1]], here, device):
        gradients[index] = here[0] = own[index] + here[0]
    return gradients
