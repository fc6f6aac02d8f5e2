"""Weighs tokens by a gradient: how much a block's output suffers from each token (VLMQ, 2508.03351).

For a decoder layer with inputs F (full-precision prefix) and U (quantised prefix), [B, T, d] each,

    L = || Attn(U) - Attn(F) ||_F^2,      Attn(x) = x + attention(norm(x)),
    g_n = mean_c | dL / dZ_cn |           for the output Z of each of the q, k, v and o projections on U's path,

one local backward pass per batch. Version 2 of the paper weights token n's squared error by g_n^2, version 1 by g_n.
Beyond the paper, scope "all" does the same for gate, up and down with L = || Layer(U) - Layer(F) ||_F^2.

At the first decoder layer U == F, the loss is 0 and there is no signal: tokens count alike, or by the loss that this
layer's own rounded weights cause.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.concentration import pooled_mean, pooled_median
from vlmq_vllm.offline.methods.saliency.weigher import Rounded, Weights
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.layers import linears_of
from vlmq_vllm.offline.model.streams import Stream, noting
from vlmq_vllm.offline.settings.quantize import Settings

Norms = list[dict[str, torch.Tensor]]  # by batch and linear, g [N]


def gradient_norms(
    layer: torch.nn.Module,
    index: int,
    family: Family,
    full: Stream,
    quantized: Stream,
    linears: list[str],
    rounding: Rounded = nullcontext,
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
        for end, target in targets.items():
            names = [name for name in linears if family.in_attention(name) == (end == "attention")]
            if not names:
                continue
            loss = (found[end] - target).square().sum()
            wanted = [outputs[name] for name in names]
            gradients = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
            for name, gradient in zip(names, gradients, strict=True):
                norms[name] = gradient.abs().mean(-1).flatten().float()
    return norms


def _ends(
    layer: torch.nn.Module, index: int, family: Family, stream: Stream, linears: list[str]
) -> dict[str, torch.Tensor]:
    """The outputs [B, T, d] of the attention block and, where any of `linears` lies outside it, of the whole layer."""
    if all(map(family.in_attention, linears)):
        (end, *_), _ = stream.call_of(layer, index, family.attention_end)
        return {"attention": end}
    with noting(layer, [family.attention_end], lambda args, kwargs, out: args[0]) as inputs:
        end = stream.call(layer, index)
    return {"attention": inputs[family.attention_end], "layer": end}


def token_weights(
    norms: list[torch.Tensor], power: int, unit: float, floor: float = 0.0, cap: float = 0.0
) -> list[torch.Tensor]:
    """lambda = clip(g / unit, floor, cap)^power for the batches' g [N]; cap 0 is none. The unit is what bounds are
    multiples of, and keeps squares away from underflow; else it changes nothing, for GPTQ's damping is relative."""
    return [(g / unit).clamp(floor, cap or None).pow(power) for g in norms]


def weighted_linears(family: Family, linears: list[str], scope: str) -> list[str]:
    """The linears that get token weights: in the attention, or with scope "all" also gate, up and down.

    Never an expert's: which tokens it sees changes when the attention before it is quantised.
    """
    return [n for n in linears if family.in_attention(n) or (scope == "all" and not is_expert(n))]


class VLMQWeights:
    """Weighs tokens by VLMQ's gradients; one object for a run."""

    def __init__(self, family: Family, settings: Settings, ranks: Ranks) -> None:
        self.family, self.settings, self.ranks = family, settings, ranks

    def __call__(
        self,
        layer: torch.nn.Module,
        index: int,
        full: list[Stream],
        quantized: list[Stream],
        rounding: Rounded,
    ) -> tuple[Weights, dict[str, str]]:
        """As `weigher.py` says, of linears with a signal."""
        options = self.settings
        linears = weighted_linears(self.family, linears_of(layer), options.saliency_scope)
        pairs = list(zip(full, quantized, strict=True))
        if all(f.hidden is q.hidden for f, q in pairs):  # nothing has been quantised yet: no error, no gradient
            norms: Norms = [dict.fromkeys(linears, f.hidden.new_zeros(f.hidden.shape[:-1].numel())) for f, _ in pairs]
        else:
            norms = [gradient_norms(layer, index, self.family, f, q, linears) for f, q in pairs]
        means = self._means(norms, linears)
        silent = [linear for linear in linears if linear not in means]
        found = {linear: "no signal" if linear in silent else "saliency" for linear in linears}
        if silent and options.saliency_fallback == "rtn":
            for stream, known in zip(quantized, norms, strict=True):
                known |= gradient_norms(layer, index, self.family, stream, stream, silent, rounding)
            means |= self._means(norms, silent)
            found |= {linear: "saliency of rounding" for linear in silent if linear in means}
        return {linear: self._token_weights([g[linear] for g in norms], means[linear]) for linear in means}, found

    def _token_weights(self, norms: list[torch.Tensor], mean: float) -> list[torch.Tensor]:
        """Of one linear, from g [N] by batch, with mean 1; bounds are multiples of the median of the positive g."""
        options = self.settings
        bounds = options.saliency_floor, options.saliency_cap
        unit = pooled_median(norms, self.ranks) if any(bounds) else mean
        weights = token_weights(norms, options.saliency_power, unit, *bounds)
        scale = 1 / pooled_mean(weights, self.ranks)
        return [weight * scale for weight in weights]

    def _means(self, norms: Norms, linears: list[str]) -> dict[str, float]:
        """Mean of g over all ranks' tokens, of linears where not all are zero and all are finite."""
        means = {linear: pooled_mean([g[linear] for g in norms], self.ranks) for linear in linears}
        return {linear: mean for linear, mean in means.items() if 0 < mean < float("inf")}
