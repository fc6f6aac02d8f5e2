"""Folds scales into a layer: columns are multiplied, what comes before them is divided, the function stays.

For a group of linears W [O, I] after a source with R output channels and scales s [R],

    W[:, i] <- W[:, i] * s[channel_i],      norm:    weight + offset <- (weight + offset) / s,  bias <- bias / s
                                            linear:  W'[r, :] <- W'[r, :] / s_r,                bias_r <- bias_r / s_r

Weights of linears are quantised afterwards and stay in float32, but a norm and a bias are stored in 16 bits. So that
their rounding loses nothing, the divided vector v / s is rounded first and s becomes v / round(v / s), in float32;
where either is zero the channel keeps s = 1. A norm's bias is the one thing that cannot be exact as well.
"""

import math
from collections.abc import Callable

import torch

from vlmq_vllm.offline.methods.awq.scalable import Scalable
from vlmq_vllm.offline.model.layers import linear_of, put, set_parameter

# Of `moved`. Measured on random layers: a right fold 1e-6, and 2e-4 before a softmax over logits of 1e4, as large
# biases of k make them; a fold into the wrong channels 7e-2 at the smallest exponent, for m up to a factor of 6 apart.
PARITY = 3e-3
# Of a value in the residual stream: two additions that each err by eps / 2, before and after; four times that.
ROUNDING = 8 * torch.finfo(torch.float32).eps
STRAYS = 0.01  # of the tokens: one that stands between two experts goes to the other for a sum's rounding

DtypeOf = Callable[[str], torch.dtype]  # by the name of a parameter in the layer, the 16-bit dtype that it is stored in
Changed = dict[str, torch.Tensor]  # by the name of a parameter in the layer, its new value in float32


def effective(
    layer: torch.nn.Module, scalable: Scalable, scales: torch.Tensor, dtype_of: DtypeOf
) -> tuple[torch.Tensor, Changed]:
    """The scales [R] float32 nearest to `scales` that fold without loss, and those of the source's divided parameters
    that are not quantised afterwards: in values of their 16-bit dtype, but a norm's bias, which is not rounded."""
    name = scalable.source
    own = dict(layer.get_submodule(name).named_parameters())
    bias = own.get("bias")
    changed = {}
    if scalable.offset is not None:
        scales, weight = _exact(own["weight"], scales, scalable.offset, dtype_of(f"{name}.weight"))
        changed[f"{name}.weight"] = weight
        if bias is not None:
            changed[f"{name}.bias"] = bias / scales
    elif bias is not None:
        found, divided = _exact(bias, scales, 0.0, dtype_of(f"{name}.bias"))
        scales = torch.where(bias == 0, scales, found)
        changed[f"{name}.bias"] = divided
    return scales, changed


def fold(layer: torch.nn.Module, scalable: Scalable, scales: torch.Tensor, changed: Changed) -> None:
    """Fold what `effective` found into the layer, in new parameters; the old ones are not written to."""
    for linear in scalable.linears:
        weight = linear_of(layer, linear).weight
        put(layer, linear, weight * scales[scalable.channel.to(weight.device)])
    if scalable.offset is None:
        put(layer, scalable.source, linear_of(layer, scalable.source).weight / scales[:, None])
    for name, value in changed.items():
        set_parameter(layer, name, value)


def moved(hidden: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """By how much a layer's output has moved from `before` to `after`, as a part of what the layer adds to a token:
    beside one token of 1e5 in the residual stream, as large models have, nothing else would be seen.

    hidden: what goes in; all [.., d] float32. For token n it is, with what float32 sums with the residual stream may
    err by taken off,

        max_c max(0, |after_nc - before_nc| - ROUNDING |before_nc|) / max_c |before_nc - hidden_nc|,

    and the result is the largest of all tokens, the share of STRAYS left out; infinite if a value is not finite.
    """
    if not after.isfinite().all():
        return math.inf
    excess = ((after - before).abs() - ROUNDING * before.abs()).clamp_min(0).flatten(0, -2).amax(-1)
    added = (before - hidden).abs().flatten(0, -2).amax(-1)
    errors = torch.where(excess > 0, excess / added, 0.0).sort().values
    return float(errors[-1 - int(STRAYS * len(errors))])


def _exact(
    stored: torch.Tensor, scales: torch.Tensor, offset: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales [R] float32 next to `scales` under which nothing is lost, and what a norm's weight or a bias `stored`
    [R] becomes, in values of `dtype`: new_scales * (new_stored + offset) is `stored` + offset but for one rounding."""
    divided = ((stored + offset) / scales - offset).to(dtype).float()
    found = (stored + offset) / (divided + offset)
    kept = ~(torch.isfinite(found) & (found > 0))
    return torch.where(kept, 1.0, found), torch.where(kept, stored, divided)
