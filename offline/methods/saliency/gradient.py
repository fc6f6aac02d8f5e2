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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.streams import Stream, noting


def gradient_norms(
    layer: torch.nn.Module,
    index: int,
    family: Family,
    full: Stream,
    quantized: Stream,
    linears: list[str],
    rounding: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, torch.Tensor]:
    """g [B * T] float32 of each of `linears`, for one batch's streams before layer `index`.

    Linears inside the attention take the loss of the attention block, others that of the whole layer. rounding: how
    the layer is changed on the quantised stream, as where both are equal and its own rounded weights make the error.
    """
    with torch.no_grad():
        targets = _ends(layer, index, family, full, linears)
    start = replace(quantized, hidden=quantized.hidden.detach().requires_grad_())
    norms = {}
    with rounding(), noting(layer, linears, lambda args, kwargs, out: out) as outputs, torch.enable_grad():
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
        ends.setdefault("attention" if family.in_attention(name) else "layer", []).append(name)
    return ends


def _ends(
    layer: torch.nn.Module, index: int, family: Family, stream: Stream, linears: list[str]
) -> dict[str, torch.Tensor]:
    """The outputs of the blocks that `linears` are judged by, [B, T, d] each, from one run of the layer."""
    if set(_by_end(family, linears)) == {"attention"}:
        (end, *_), _ = stream.call_of(layer, index, family.attention_end)
        return {"attention": end}
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
