"""Weighs tokens by the gradient of a local loss (VLMQ, 2508.03351): which linears, and what stands in for no signal."""

import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.concentration import pooled_mean, pooled_median
from vlmq_vllm.offline.methods.saliency.gradient import gradient_norms, token_weights
from vlmq_vllm.offline.methods.saliency.weigher import Rounded, Weights
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.layers import linears_of
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.settings.quantize import Settings

Norms = list[dict[str, torch.Tensor]]  # by batch and linear, g [N]


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
        """Token weights [N] per batch of each weighted linear with a signal, and what the report says of them all.

        `rounding()` puts the layer's own rounded weights in place, for the fallback "rtn".
        """
        options = self.settings
        linears = weighted_linears(self.family, linears_of(layer), options.saliency_scope)
        pairs = list(zip(full, quantized, strict=True))
        if all(f.hidden is q.hidden for f, q in pairs):  # nothing has been quantised yet: no error, no gradient
            norms: Norms = [dict.fromkeys(linears, f.hidden.new_zeros(f.hidden.shape[:-1].numel())) for f, _ in pairs]
        else:
            norms = [gradient_norms(layer, index, self.family, f, q, linears) for f, q in pairs]
        means = self._means(norms, linears)
        silent = [linear for linear in linears if means[linear] is None]
        found = {linear: "no signal" if linear in silent else "saliency" for linear in linears}
        if silent and options.saliency_fallback == "rtn":
            for stream, known in zip(quantized, norms, strict=True):
                known |= gradient_norms(layer, index, self.family, stream, stream, silent, rounding)
            means |= self._means(norms, silent)
            found |= {linear: "saliency of rounding" for linear in silent if means[linear] is not None}
        weights = {
            linear: self._token_weights([g[linear] for g in norms], mean)
            for linear, mean in means.items()
            if mean is not None
        }
        return weights, found

    def _token_weights(self, norms: list[torch.Tensor], mean: float) -> list[torch.Tensor]:
        """Of one linear, from g [N] by batch, with mean 1; bounds are multiples of the median of the positive g."""
        options = self.settings
        bounds = options.saliency_floor, options.saliency_cap
        unit = pooled_median(norms, self.ranks) if any(bounds) else mean
        weights = token_weights(norms, options.saliency_power, unit, *bounds)
        scale = 1 / pooled_mean(weights, self.ranks)
        return [weight * scale for weight in weights]

    def _means(self, norms: Norms, linears: list[str]) -> dict[str, float | None]:
        """Mean of g over all ranks' tokens; None where all are zero or some are not finite."""
        means: dict[str, float | None] = {}
        for linear in linears:
            mean = pooled_mean([g[linear] for g in norms], self.ranks)
            means[linear] = mean if 0 < mean < float("inf") else None
        return means
