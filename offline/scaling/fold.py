"""Folding scales into a layer: columns are multiplied, what is in front of them is divided, the function stays.

For a group of linears W [O, I] behind a source with R output channels and scales s [R],

    W[:, i] <- W[:, i] * s[channel_i],      norm:    weight + offset <- (weight + offset) / s,  bias <- bias / s
                                            linear:  W'[r, :] <- W'[r, :] / s_r,                bias_r <- bias_r / s_r

Weights of linears are quantised afterwards and stay in float32, but a norm and a bias are stored in 16 bits. So that
their rounding loses nothing, the divided vector v / s is rounded first and s becomes v / round(v / s), in float32;
where either is zero the channel keeps s = 1. A norm's bias is the one thing that cannot be exact as well.
"""

from collections.abc import Callable

import torch

from vlmq_vllm.offline.linears import put, set_parameter
from vlmq_vllm.offline.scaling.groups import Scalable

DtypeOf = Callable[[str], torch.dtype]  # by the name of a parameter in the layer, the 16-bit dtype that it is stored in
Changed = dict[str, torch.Tensor]  # by the name of a parameter in the layer, its new value in float32


def effective(
    layer: torch.nn.Module, scalable: Scalable, scales: torch.Tensor, dtype_of: DtypeOf
) -> tuple[torch.Tensor, Changed]:
    """The scales [R] float32 nearest to `scales` that fold without loss, and the source's divided parameters.

    These are what is not quantised afterwards: a norm's weight or a linear's bias with values that the 16-bit dtype
    holds, and a norm's bias, which is not rounded.
    """
    source, name = layer.get_submodule(scalable.source), scalable.source
    bias = dict(source.named_parameters()).get("bias")
    changed = {}
    if scalable.offset is not None:
        scales, weight = _exact(source.weight, scales, scalable.offset, dtype_of(f"{name}.weight"))
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
        weight = layer.get_submodule(linear).weight
        put(layer, linear, weight * scales[scalable.channel.to(weight.device)])
    if scalable.offset is None:
        put(layer, scalable.source, layer.get_submodule(scalable.source).weight / scales[:, None])
    for name, value in changed.items():
        set_parameter(layer, name, value)


def _exact(
    stored: torch.Tensor, scales: torch.Tensor, offset: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and what is stored, so that (stored + offset) / scales is just what the new one + offset makes."""
    divided = ((stored + offset) / scales - offset).to(dtype).float()
    found = (stored + offset) / (divided + offset)
    kept = ~(torch.isfinite(found) & (found > 0))
    return torch.where(kept, 1.0, found), torch.where(kept, stored, divided)
