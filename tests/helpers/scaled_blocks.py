"""Small layers without attention whose channels can be scaled, and `Scaling` as the tests of it call it."""

from dataclasses import replace

import torch
from torch import nn

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.grid import MINMAX
from vlmq_vllm.offline.model.families import FAMILIES
from vlmq_vllm.offline.model.groups import find_stages
from vlmq_vllm.offline.model.streams import Stream

CPU = torch.device("cpu")
FORMAT = WeightFormat(3, 32, False)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
FAMILY = replace(FAMILIES["llava"], attention_end="norm")  # of Block below


def all_three_bits(linear):
    return FORMAT


def bfloat16(name):
    return torch.bfloat16


def scale(layer, index, streams, weights=None, format_of=all_three_bits, dtype_of=bfloat16, family=FAMILY, **options):
    scaling = Scaling(options.pop("grid", MINMAX), Ranks(CPU), **options)
    stages = find_stages(layer, index, streams[0])
    return scaling(layer, index, family, stages, streams, weights or {}, format_of, dtype_of)


class Scaled(nn.Module):
    """x / rms(x) * (weight + offset)."""

    def __init__(self, size, offset):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(size)), offset

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (self.weight + self.offset)


class Block(nn.Module):
    """An MLP with its norm and residual; no attention, so that tokens know nothing of each other."""

    def __init__(self, size, inner, norm, bias=False):
        super().__init__()
        self.norm, self.mlp = norm, nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(size, inner, bias=bias) for _ in range(2))
        self.mlp.down_proj = nn.Linear(inner, size, bias=bias)
        self.mlp.forward = self.inner
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(False).copy_(parameter.bfloat16().float())

    def inner(self, x):
        return self.mlp.down_proj(nn.functional.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def streams_of(*shapes, size=75) -> list[Stream]:
    """Batches [B, T, size] whose channels differ in size by a factor of up to e^4."""
    spread = torch.exp(torch.randn(size))
    return [Stream(torch.randn(*shape, size) * spread, [((), {})]) for shape in shapes]
