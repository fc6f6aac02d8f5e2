"""Says which linears of a layer can have their columns scaled: those after something that can be divided instead.

AWQ (2306.00978, section 3.2) multiplies the columns of a group's weights by s and divides what they read by s; the
division must be folded into the operation that makes it. Two kinds of operation can take it:

    a norm whose output the group reads       its weight (or 1 + weight, as in Gemma) and its bias are divided
    a linear in the same module, v before     its rows and its bias are divided; with grouped-query attention several
    o, up before down                         columns of o read one row of v and share its s

The names are those of every decoder that is supported (`model/families.py`); that a layer is joined as they say is
checked after folding (`search.py`).
"""

from dataclasses import dataclass

import torch

from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.groups import Group
from vlmq_vllm.offline.model.layers import linear_of
from vlmq_vllm.offline.model.rotation import FIRST_NORM

BEFORE = {"o_proj": "v_proj", "down_proj": "up_proj"}
READERS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # all that read a norm
SAME = 1e-4  # of a channel's largest value; a norm of another kind is off by half of it or more


@dataclass(frozen=True)
class Scalable:
    """A group of linears [O, I] and the module before it, `source`, with R output channels.

    channel: [I] int64 on the CPU, the channel of `source` that each column reads. offset: of the norm, whose outputs go
    with weight + offset (0 or 1); None where the source is a linear.
    """

    source: str
    linears: Group
    channel: torch.Tensor
    offset: float | None


@torch.no_grad()
def find_scalable(layer: torch.nn.Module, stage: list[Group], family: Family) -> list[Scalable]:
    """What can be scaled of a stage's groups, all of them or none.

    Experts can be scaled after linears only: a norm before experts feeds their router too.
    """
    found = [_after_linear(layer, group) or _after_norm(layer, group, family) for group in stage]
    known = [scalable for scalable in found if scalable]
    return known if len(known) == len(stage) else []


def _after_linear(layer: torch.nn.Module, group: Group) -> Scalable | None:
    parent, _, leaf = group[0].rpartition(".")
    if leaf not in BEFORE:
        return None
    source = f"{parent}.{BEFORE[leaf]}"
    channel = _channel(layer, source, group[0])
    return None if channel is None else Scalable(source, group, channel, None)


def _after_norm(layer: torch.nn.Module, group: Group, family: Family) -> Scalable | None:
    if is_expert(group[0]) or {linear.rpartition(".")[2] for linear in group} not in READERS:
        return None
    name = FIRST_NORM if family.in_attention(group[0]) else family.attention_end
    offset = _offset(layer.get_submodule(name))
    return (
        None if offset is None else Scalable(name, group, torch.arange(linear_of(layer, group[0]).in_features), offset)
    )


def _channel(layer: torch.nn.Module, source: str, reader: str) -> torch.Tensor | None:
    """The row of linear `source` that each column of `reader` [I] reads: its own, or with grouped queries the one of
    the head that its own shares. None where the sizes do not allow either."""
    rows, columns = linear_of(layer, source).out_features, linear_of(layer, reader).in_features
    every = torch.arange(columns)
    if rows == columns:
        return every
    width = getattr(layer.get_submodule(reader.rpartition(".")[0]), "head_dim", None)
    if width is None or columns % rows or rows % width:
        return None
    return every // width // (columns // rows) * width + every % width


def _offset(norm: torch.nn.Module) -> float | None:
    """0 for a norm whose output goes with its weight [C], 1 if with 1 + weight; None for anything else. It is tried on
    random inputs, with weights times powers of two, which is exact."""
    own = dict(norm.named_parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, len(own["weight"]), generator=generator).to(own["weight"])
    powers = torch.tensor([0.5, 2.0, 4.0])[torch.randint(3, (x.shape[1],), generator=generator)].to(x)
    expected = norm(x) * powers
    for offset in (0.0, 1.0):
        moved = {"weight": (own["weight"] + offset) * powers - offset}
        if "bias" in own:
            moved["bias"] = own["bias"] * powers
        error = (torch.func.functional_call(norm, moved, (x,)) - expected).abs().amax(0)
        if bool((error <= SAME * expected.abs().amax(0)).all()):
            return offset
    return None
