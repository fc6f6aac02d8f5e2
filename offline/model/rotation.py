"""Turns the decoder's residual stream and its values by orthogonal matrices that are folded into weights.

QuaRot (2404.00456) and SpinQuant (2405.16406) call them R1 and R2. With Q [d, d] for the residual stream and R_l [h, h]
for the heads of layer l,

    what enters the stream (embeddings, connectors' outputs)     x -> x Q
    what reads it, after a norm with scale g                     W -> W diag(g) Q,     g -> 1
    what writes to it (o_proj, down_proj)                        W -> Q^T W
    each head of v_proj, each of o_proj                          V -> R_l^T V,         O -> O R_l

changes nothing but the rounding of the 16-bit weights: an RMS norm without a scale commutes with Q. A head that is tied
to the embeddings becomes a matrix of its own. Outlier channels of the stream are spread over all columns, which a grid
for groups of weights holds better.
"""

import copy
import re
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.layers import called

READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate")  # gate: chooses experts
WRITING = ("o_proj", "down_proj")
ENTERING = ("image_newline",)  # parameters beside the embeddings that stand in the stream as they are
FIRST_NORM = "input_layernorm"
HEAD = "lm_head.weight"
ROWS = 1 << 14  # of embeddings and head that are in float32 at once


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A matrix [size, size] float64, uniform over all orthogonal ones."""
    return torch.nn.init.orthogonal_(torch.empty(size, size, dtype=torch.float64), generator=generator)


class Rotation:
    """The rotation of one model; called with a parameter it gives the one of the turned model.

    original: gives a parameter as stored, by its in-memory name. device: where everything is computed, so that a
    parameter has the same bits whenever it is asked for. Raises RefusedError for a model whose decoder is not made of
    RMS norms each of which is read by linears alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        config: Any,
        original: Callable[[str], torch.Tensor],
        seed: int,
        device: torch.device,
    ) -> None:
        self.family, self.seed, self.device = family, seed, device
        text = config.get_text_config()
        self.size = text.hidden_size
        self.head_size = getattr(text, "head_dim", None) or self.size // text.num_attention_heads
        self.layers = text.num_hidden_layers
        self.last_norm = f"{family.layers.rpartition('.')[0]}.norm"
        self.embeddings = f"{family.embed}.weight"
        self.scale = cache(lambda norm: original(f"{norm}.weight").to(device, torch.float32))
        self._check_parameters(model, config.model_type)
        self.exits = {name for root in family.connectors for name in self._last_linears(model, root, config.model_type)}
        for norm in (f"{family.layers}.0.{FIRST_NORM}", f"{family.layers}.0.{family.attention_end}", self.last_norm):
            self._check_norm(model.get_submodule(norm), norm, config.model_type)

    @cached_property
    def matrices(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Q [d, d] and by layer R_l [h, h], float32; drawn when they are first needed, for a plan needs none."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [self.size, *[self.head_size] * self.layers]
        stream, *heads = (random_orthogonal(size, generator).to(self.device, torch.float32) for size in sizes)
        return stream, heads

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The parameter of that in-memory name, in the dtype and on the device of `value`; in float32 in between."""
        if name not in (HEAD, self.embeddings):
            return self._turned(name, value.to(self.device)).to(value.device, value.dtype)
        turned = torch.empty_like(value)
        for first in range(0, len(value), ROWS):
            part = value[first : first + ROWS].to(self.device)
            turned[first : first + ROWS] = self._turned(name, part)
        return turned

    def _turned(self, name: str, value: torch.Tensor) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        stream, _ = self.matrices
        if name.startswith(f"{self.family.layers}."):
            return self._in_layer(name, value)
        if name == HEAD:
            return self._read(value, self.last_norm)
        if owner == self.last_norm:
            return torch.ones_like(value)
        if name == self.embeddings or leaf in ENTERING or (owner in self.exits and leaf == "bias"):
            return value.float() @ stream
        return stream.T @ value.float() if owner in self.exits else value

    def _in_layer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        number, _, inner = name.removeprefix(f"{self.family.layers}.").partition(".")
        owner, _, leaf = inner.rpartition(".")
        linear = owner.rpartition(".")[2]
        if owner in (FIRST_NORM, self.family.attention_end):
            return torch.ones_like(value)
        stream, heads = self.matrices
        own = heads[int(number)]
        if linear in READING and leaf == "weight":
            norm = FIRST_NORM if inner.startswith(f"{self.family.attention}.") else self.family.attention_end
            value = self._read(value, f"{self.family.layers}.{number}.{norm}")
        if linear == "v_proj":  # weight and bias
            return (own.T @ value.float().view(-1, self.head_size, value.numel() // len(value))).view(value.shape)
        if linear == "o_proj" and leaf == "weight":
            value = (value.float().view(len(value), -1, self.head_size) @ own).flatten(1)
        if linear in WRITING:
            return value.float() @ stream if leaf == "bias" else stream.T @ value.float()
        return value

    def _read(self, weight: torch.Tensor, norm: str) -> torch.Tensor:
        """W diag(g) Q."""
        return weight.float() * self.scale(norm) @ self.matrices[0]

    def _check_parameters(self, model: torch.nn.Module, model_type: str) -> None:
        """Every parameter of a layer with the stream's or a head's size must be known."""
        linears = "|".join((*READING, *WRITING))
        norms = f"{FIRST_NORM}|{re.escape(self.family.attention_end)}|{self.family.attention}.[qk]_norm"
        known = re.compile(rf"\d+\.(.+\.({linears})\.(weight|bias)|({norms})\.weight)")
        for name, parameter in model.get_submodule(self.family.layers).named_parameters():
            if {self.size, self.head_size} & set(parameter.shape) and not known.fullmatch(name):
                raise _refused(model_type, f"has {name.partition('.')[2]} in its layers")

    def _check_norm(self, norm: torch.nn.Module, name: str, model_type: str) -> None:
        """The norm must be x g / |x| sqrt(d): one with (1 + g) or a mean taken off is another function."""
        probe = copy.deepcopy(norm).to_empty(device=self.device)
        scale = self.scale(name)
        probe.load_state_dict({"weight": scale})
        x = 100 * torch.randn(8, self.size, generator=torch.Generator().manual_seed(0)).to(self.device) + 50
        expected = x * x.square().mean(-1, keepdim=True).rsqrt() * scale
        if not torch.allclose(probe(x).float(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise _refused(model_type, f"has a norm {name} that is no plain RMS norm")

    def _last_linears(self, model: torch.nn.Module, root: str, model_type: str) -> list[str]:
        """The linears that the connectors under `root` end in, by in-memory name."""
        found = []
        for part in called(model, root):
            inside = [(n, m) for n, m in model.get_submodule(part).named_modules() if list(m.parameters(recurse=False))]
            name, last = inside[-1]
            if not isinstance(last, torch.nn.Linear):
                raise _refused(model_type, f"has a connector {part} that ends in no linear")
            found.append(f"{part}.{name}")
        return found


def _refused(model_type: str, reason: str) -> RefusedError:
    return RefusedError(f"rotate: {model_type} {reason}, and a rotation does not go through that; leave out --rotate")
