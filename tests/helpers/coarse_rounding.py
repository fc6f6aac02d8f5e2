"""Weights and tokens rounded so coarsely that their errors stand out from those of floats."""

import torch

from vlmq_vllm.offline.methods.saliency.qig import distance, input_of
from vlmq_vllm.offline.model.layers import weights_of


def coarse(layer, step=0.05):
    """Weights of the layer's linears, rounded to multiples of `step`."""
    return {name: (weight / step).round() * step for name, weight in weights_of(layer).items()}


def coarse_tokens(x):
    """Four bits with a scale for each token."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    return torch.where(scale == 0, x, (x / scale).round() * scale)


@torch.no_grad()
def completeness(module, quantized, call, gradients, start=None):
    """sum IG - (F(Z1) - F(Z0)): what the midpoint sum lacks, for IG [N, C] of the same arguments."""
    end = input_of(call)
    start = torch.zeros_like(end) if start is None else start
    first, last = (distance(module, quantized, call, point).double() for point in (start, end))
    return float(gradients.double().sum() - last + first)
