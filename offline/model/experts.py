"""Gives mixture-of-experts layers one linear per expert and projection, in the place of fused tensors.

transformers keeps all experts of a layer in two parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]. A
quantiser needs linears with inputs of their own, and vLLM's loaders expect one packed weight per expert.
"""

import re

import torch
from torch import nn


class Expert(nn.Module):
    """One gated MLP, [N, H] -> [N, H]."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """All experts of a layer; called as transformers calls its fused module."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [N, H], chosen experts and their weights [N, k] -> [N, H]. Experts without tokens run on none."""
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, slot = torch.where(chosen == index)
            out = out.index_add(0, token, expert(hidden[token]) * weights[token, slot, None])
        return out


def is_expert(linear: str) -> bool:
    """Whether the linear of that name in a layer belongs to one of several experts."""
    return re.search(r"\.\d+\.(gate|up|down)_proj$", linear) is not None


def unfuse(model: nn.Module) -> dict[str, int]:
    """Put `Experts` in the place of every fused module of `model` (on meta); their names with the number of experts.

    Only for families whose experts are activation(gate) * up: a row of `families.py` is tested for it.
    """
    found = {}
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if set(own) == {"gate_up_proj", "down_proj"} and all(parameter.ndim == 3 for parameter in own.values()):
            count, hidden, inner = module.down_proj.shape
            with torch.device("meta"):
                experts = Experts(Expert(hidden, inner, module.act_fn) for _ in range(count))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, experts)
            found[name] = count
    return found
