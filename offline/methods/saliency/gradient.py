"""Computes token saliency by a gradient: how much a block's output suffers from each token (VLMQ, 2508.03351).

For a decoder layer with inputs F (full-precision prefix) and U (quantised prefix), [B, T, d] each,

    L = || Attn(U) - Attn(F) ||_F^2,      Attn(x) = x + attention(norm(x)),
    g_n = mean_c | dL / dZ_cn |           for the output Z of each of the q, k, v and o projections on U's path,

one local backward pass per batch. Version 2 of the paper weights token n's squared error by g_n^2, version 1 by g_n.
Beyond the paper, scope "all" does the same for gate, up and down with L = || Layer(U) - Layer(F) ||_F^2.

At the first decoder layer U == F, the loss is 0 and there is no signal: the caller falls back to equal weights, or to
the loss that this layer's own rounded weights cause.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.streams import Stream


def gradient_norms(
    layer: torch.nn.Module, index: int, family: Family, full: Stream, quantized: Stream, linears: list[str]
) -> dict[str, torch.Tensor]:
    """g [B * T] float32 of each of `linears`, for one batch's streams before layer `index`.

    Linears inside the attention take the loss of the attention block, others that of the whole layer.
    """
    with torch.no_grad():
        targets = _ends(layer, index, family, full, linears)
    return _norms(layer, index, family, quantized, linears, targets)


def rounded_norms(
    layer: torch.nn.Module,
    index: int,
    family: Family,
    stream: Stream,
    linears: list[str],
    rounding: Callable[[], AbstractContextManager],
) -> dict[str, torch.Tensor]:
    """The same where both streams are equal: the error is that of the layer with rounded weights, into which the
    context manager `rounding()` puts it for a while."""
    with torch.no_grad():
        targets = _ends(layer, index, family, stream, linears)
    with rounding():
        return _norms(layer, index, family, stream, linears, targets)


def _norms(
    layer: torch.nn.Module,
    index: int,
    family: Family,
    stream: Stream,
    linears: list[str],
    targets: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """g [B * T] of each of `linears`; targets: as `_ends` gives them, without the error."""
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        layer.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
        for name in linears
    ]
    start = replace(stream, hidden=stream.hidden.detach().requires_grad_())
    norms = {}
    with removing(handles), torch.enable_grad():
        found = _ends(layer, index, family, start, linears)
        for end, names in _by_end(family, linears).items():
            loss = (found[end] - targets[end]).square().sum()
            wanted = [outputs[name] for name in names]
            gradients = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
            for name, gradient in zip(names, gradients, strict=True):
                norms[name] = gradient.abs().mean(-1).flatten().float()
    return norms


def _by_end(family: Family, linears: list[str]) -> dict[str, list[str]]:
    """The linears by the block whose output they are judged by, "attention" or "layer"."""
    ends: dict[str, list[str]] = {}
    for name in linears:
        ends.setdefault("attention" if in_attention(family, name) else "layer", []).append(name)
    return ends


def in_attention(family: Family, name: str) -> bool:
    """Whether the linear belongs to the attention module of a decoder layer."""
    return name.startswith(family.attention + ".")


def _ends(
    layer: torch.nn.Module, index: int, family: Family, stream: Stream, linears: list[str]
) -> dict[str, torch.Tensor]:
    """The outputs of the blocks that `linears` are judged by, [B, T, d] each, from one run of the layer."""
    if set(_by_end(family, linears)) == {"attention"}:
        return {"attention": stream.until(layer, index, family.attention_end)}
    ends: dict[str, torch.Tensor] = {}
    norm = layer.get_submodule(family.attention_end)
    with removing([norm.register_forward_pre_hook(lambda m, inputs: ends.update(attention=inputs[0]))]):
        ends["layer"] = stream.call(layer, index)
    return ends


def token_weights(
    norms: list[torch.Tensor], power: int, unit: float, floor: float = 0.0, cap: float = 0.0
) -> list[torch.Tensor]:
    """lambda = clip(g / unit, floor, cap)^power for the batches' g [N]; cap 0 is none.

    The unit changes nothing in GPTQ (its damping is relative) but what the bounds are multiples of; it keeps squares
    away from underflow.
    """
    return [(g / unit).clamp(floor, cap or None).pow(power) for g in norms]
