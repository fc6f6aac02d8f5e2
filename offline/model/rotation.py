"""Turns the decoder's residual stream and its values by orthogonal matrices that are folded into weights.

QuaRot (2404.00456) and SpinQuant (2405.16406) call them R1 and R2. With Q [d, d] for the residual stream and R_l [h, h]
for the heads of layer l,

    what enters the stream (embeddings, connectors' outputs)     x -> x Q
    what reads it, after a norm with scale g                     W -> W diag(g) Q,     g -> 1
    what writes to it (o_proj, down_proj)                        W -> Q^T W
    each head of v_proj, each of o_proj                          V -> R_l^T V,         O -> O R_l

changes nothing but the rounding of the 16-bit weights: an RMS norm without a scale commutes with Q. It costs nothing
when served either, for only weights change, but for a head that is tied to the embeddings: it becomes a matrix of its
own. Outlier channels of the stream are spread over all columns, which a grid for groups of weights holds better.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.model.families import Family

READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate")  # gate: chooses experts
WRITING = ("o_proj", "down_proj")
ENTERING = ("image_newline",)  # parameters beside the embeddings that stand in the stream as they are
FIRST_NORM = "input_layernorm"
HEAD = "lm_head.weight"
ROWS = 1 << 14  # of embeddings and head that are in float32 at once


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A matrix [size, size] float64, uniform over all orthogonal ones (QR of a Gaussian, signs of R's diagonal)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


class Rotation:
    """The rotation of one model; called with a parameter it gives the one of the turned model.

    original: gives a parameter as stored, by its in-memory name. Raises RefusedError for a model whose decoder is not
    made of RMS norms each of which is read by linears alone.
    """

    def __init__(
        self, model: torch.nn.Module, family: Family, config: Any, original: Callable[[str], torch.Tensor], seed: int
    ) -> None:
        self.family, self.original = family, original
        text = config.get_text_config()
        self.size = text.hidden_size
        self.head_size = getattr(text, "head_dim", None) or self.size // text.num_attention_heads
        self.root = family.layers.rpartition(".")[0]
        self.exits = {name for root in family.connectors for name in _last_linears(model, root)}
        self._check(model, config.model_type)
        generator = torch.Generator().manual_seed(seed)
        layers = len(model.get_submodule(family.layers))  # type: ignore[arg-type]
        self.stream = random_orthogonal(self.size, generator).float()
        self.heads = [random_orthogonal(self.head_size, generator).float() for _ in range(layers)]

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The parameter of that in-memory name, in the dtype and on the device of `value`; in float32 in between."""
        if len(value) > ROWS and name in (HEAD, f"{self.family.embed}.weight"):
            return torch.cat([self(name, part) for part in value.split(ROWS)])
        owner, _, leaf = name.rpartition(".")
        turned = value
        if name.startswith(f"{self.family.layers}."):
            turned = self._in_layer(name, value)
        elif name == HEAD:
            turned = self._read(value, f"{self.root}.norm.weight")
        elif name == f"{self.root}.norm.weight":
            turned = torch.ones_like(value)
        elif name == f"{self.family.embed}.weight" or leaf in ENTERING or (owner in self.exits and leaf == "bias"):
            turned = value.float() @ self._matrix(value)
        elif owner in self.exits:
            turned = self._matrix(value).T @ value.float()
        return turned.to(value.dtype)

    def _in_layer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        layer, number, inner = self._split(name)
        owner, _, leaf = inner.rpartition(".")
        linear = owner.rpartition(".")[2]
        if owner in (FIRST_NORM, self.family.attention_end):
            return torch.ones_like(value)
        heads = self.heads[number].to(value.device)
        if linear in READING and leaf == "weight":
            attention = inner.startswith(f"{self.family.attention}.")
            norm = FIRST_NORM if attention else self.family.attention_end
            value = self._read(value, f"{layer}.{norm}.weight")
        if linear == "v_proj":  # weight and bias
            return (heads.T @ value.float().view(-1, self.head_size, value.numel() // len(value))).view(value.shape)
        if linear == "o_proj" and leaf == "weight":
            value = (value.float().view(len(value), -1, self.head_size) @ heads).flatten(1)
        if linear in WRITING:
            matrix = self._matrix(value)
            return value.float() @ matrix if leaf == "bias" else matrix.T @ value.float()
        return value

    def _read(self, weight: torch.Tensor, norm: str) -> torch.Tensor:
        """W diag(g) Q."""
        return weight.float() * self.original(norm).to(weight.device, torch.float32) @ self._matrix(weight)

    def _matrix(self, like: torch.Tensor) -> torch.Tensor:
        self.stream = self.stream.to(like.device)  # once: all parameters of a run go to one device
        return self.stream

    def _split(self, name: str) -> tuple[str, int, str]:
        """In-memory name of the layer, its number, and the parameter's name in it."""
        number, _, inner = name.removeprefix(f"{self.family.layers}.").partition(".")
        return f"{self.family.layers}.{number}", int(number), inner

    def _check(self, model: torch.nn.Module, model_type: str) -> None:
        """Every parameter with the stream's size must be known to read it, to write to it or to scale its norm."""
        norms = (FIRST_NORM, self.family.attention_end)
        linears = "|".join((*READING, *WRITING))
        for name, parameter in model.get_submodule(self.family.layers).named_parameters():
            inner = name.partition(".")[2]
            known = re.search(rf"(^|\.)({linears})\.(weight|bias)$", inner) or inner in {f"{n}.weight" for n in norms}
            if self.size in parameter.shape and not known:
                raise RefusedError(
                    f"rotate: {model_type} has {inner} in its decoder's layers, through which a rotation of the stream "
                    "does not go; leave out --rotate"
                )
        if not self.exits:
            raise RefusedError(f"rotate: the connector of {model_type} does not end in a linear; leave out --rotate")


def _last_linears(model: torch.nn.Module, root: str) -> list[str]:
    """The linears that the connectors under `root` end in, by in-memory name; none for one that ends otherwise."""
    module = model.get_submodule(root)
    parts = [f"{root}.{i}" for i in range(len(module))] if isinstance(module, torch.nn.ModuleList) else [root]
    found = []
    for part in parts:
        leaves = [(name, leaf) for name, leaf in model.get_submodule(part).named_modules() if not list(leaf.children())]
        name, leaf = next(((n, m) for n, m in reversed(leaves) if list(m.parameters(recurse=False))), ("", None))
        if isinstance(leaf, torch.nn.Linear):
            found.append(f"{part}.{name}")
    return found
