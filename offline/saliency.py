"""Token saliency: how much the attention block's output suffers from what happens at each token (VLMQ, 2508.03351).

For a decoder layer with inputs F (full-precision prefix) and U (quantised prefix), [1, T, d] each,

    L = || Attn(U) - Attn(F) ||_F^2,      Attn(x) = x + attention(norm(x)),
    g_n = mean_c | dL / dZ_cn |           for the output Z of each of the q, k, v and o projections on U's path,

one local backward pass per sample. Version 2 of the paper weights token n's squared error by g_n^2, version 1 by g_n.
At the first decoder layer U == F, the loss is 0 and there is no signal: the caller falls back to equal weights.
"""

import torch

from vlmq_vllm.offline.models import Family
from vlmq_vllm.offline.stream import removing


def gradient_norms(
    layer: torch.nn.Module, family: Family, full: torch.Tensor, quantized: torch.Tensor, kwargs: dict
) -> dict[str, torch.Tensor]:
    """g [T] float32 of each projection in `family.weighted`, for one sample's F and U [1, T, d]."""
    with torch.no_grad():
        target = attend(layer, family, full, kwargs)
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        layer.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
        for name in family.weighted
    ]
    with removing(handles), torch.enable_grad():
        found = attend(layer, family, quantized.detach().requires_grad_(), kwargs)
        loss = (found - target).square().sum()
        gradients = torch.autograd.grad(loss, [outputs[name] for name in family.weighted])
    return {
        name: gradient.abs().mean(-1).flatten().float()
        for name, gradient in zip(family.weighted, gradients, strict=True)
    }


def attend(layer: torch.nn.Module, family: Family, x: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """The attention block with its residual, [1, T, d] -> [1, T, d]."""
    normed = layer.get_submodule(family.attention_norm)(x)
    return x + layer.get_submodule(family.attention)(hidden_states=normed, **kwargs)[0]


def token_weights(norms: list[torch.Tensor], power: int) -> list[torch.Tensor] | None:
    """lambda = (g / mean g)^power for the samples' g [T]; None where g carries no signal (all zero, or not finite).

    The common factor changes nothing in GPTQ (its damping is relative); it keeps squares away from underflow.
    """
    pooled = torch.cat(norms)
    mean = pooled.mean()
    if not (torch.isfinite(pooled).all() and mean > 0):
        return None
    return [(g / mean).pow(power) for g in norms]
