"""Finds which linears of a layer can have their columns scaled: those after something that can be divided instead.

AWQ (2306.00978, section 3.2) multiplies the columns of a group's weights by s and divides what they read by s; the
division must be folded into the operation that makes it. Two kinds of operation can take it:

    a norm whose output the group reads       its weight (or 1 + weight, as in Gemma) and its bias are divided
    a linear in the same module, v before     its rows and its bias are divided; with grouped-query attention several
    o, up before down                         columns of o read one row of v and share its s

Nothing is known by name: a candidate is tried. Its output is multiplied by powers of two, channel by channel, which is
exact; the group must then read just that, and with the group's inputs put back the layer's output must be what it was,
so that nobody else reads it. Folding itself is `fold.py`'s business.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile

import torch

from vlmq_vllm.offline.model.groups import Group
from vlmq_vllm.offline.model.layers import linear_of, linears_of
from vlmq_vllm.offline.model.streams import Stream, noting

SAME = 1e-4  # of a channel's largest value; a channel that does not follow is off by half of it or more


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

    @property
    def channels(self) -> int:
        """R."""
        return int(self.channel.max()) + 1


@torch.no_grad()
def find_scalable(layer: torch.nn.Module, index: int, stage: list[Group], stream: Stream) -> list[Scalable]:
    """What can be scaled of a stage's groups, all of them or none; `stream` before layer `index`, short is enough.

    Groups of several experts can be scaled after linears only: a norm before experts feeds their router too.
    """
    seen = _look(layer, index, stream)
    for found in _candidates(layer, stage, seen):
        if _holds(layer, index, stream, found, seen):
            return found
    return []


@dataclass(frozen=True)
class _Seen:
    """One run of the layer: linears' inputs in the order in which they ran, what may be norms with args, kwargs and
    output, the layer's output."""

    inputs: dict[str, torch.Tensor]
    norms: dict[str, tuple[tuple, dict, torch.Tensor]]
    output: torch.Tensor


def _look(layer: torch.nn.Module, index: int, stream: Stream) -> _Seen:
    norms = [name for name, module in layer.named_modules() if _is_norm(module)]
    with (
        noting(layer, linears_of(layer), lambda args, kwargs, out: args[0]) as inputs,
        noting(layer, norms, lambda *call: call) as calls,
    ):
        return _Seen(inputs, calls, stream.call(layer, index))


def _is_norm(module: torch.nn.Module) -> bool:
    """A module that may be one: a vector as weight, perhaps one as bias, and nothing else."""
    own = dict(module.named_parameters())
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())


def _candidates(layer: torch.nn.Module, stage: list[Group], seen: _Seen) -> Iterator[list[Scalable]]:
    """The stage's groups, each after a module that might take the division."""
    columns = linear_of(layer, stage[0][0]).in_features
    if len(stage) == 1:
        inputs = seen.inputs[stage[0][0]]
        for name, (args, kwargs, out) in seen.norms.items():
            norm = layer.get_submodule(name)
            if out is inputs and norm.get_parameter("weight").shape == (columns,):
                offset = _offset(norm, args, kwargs, out)
                if offset is not None:
                    yield [Scalable(name, stage[0], torch.arange(columns), offset)]
    if any(len(group) > 1 for group in stage):
        return
    parents = [group[0].rpartition(".")[0] for group in stage]
    before = takewhile(lambda name: name != stage[0][0], seen.inputs)
    for name in reversed([name for name in before if name.rpartition(".")[0] == parents[0]]):
        sources = [f"{parent}.{name.rpartition('.')[2]}".lstrip(".") for parent in parents]
        found = [
            Scalable(source, group, channel, None)
            for source, group in zip(sources, stage, strict=True)
            if (channel := _channel(layer, source, group[0])) is not None
        ]
        if len(found) == len(stage):
            yield found


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


def _powers(count: int, like: torch.Tensor) -> torch.Tensor:
    """Powers of two [count], none of them 1 and in no order, in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([0.5, 2.0, 4.0])[torch.randint(3, (count,), generator=generator)].to(like)


def _offset(norm: torch.nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> float | None:
    """0 for a norm whose output goes with its weight, 1 if with 1 + weight; None for anything else. args, kwargs and
    out [.., C] are those of its call."""
    own = dict(norm.named_parameters())
    powers = _powers(len(own["weight"]), out)
    for offset in (0.0, 1.0):
        moved = {"weight": (own["weight"] + offset) * powers - offset}
        if "bias" in own:
            moved["bias"] = own["bias"] * powers
        if _same(torch.func.functional_call(norm, moved, args, kwargs), out * powers):
            return offset
    return None


def _holds(layer: torch.nn.Module, index: int, stream: Stream, found: list[Scalable], seen: _Seen) -> bool:
    """Whether the groups, and nobody else, read the output channels of their sources as they are."""
    followed: list[bool] = []

    def put_back(scalable: Scalable, powers: torch.Tensor) -> Callable:
        """A hook before a linear that compares what it reads with its input times powers [R], and undoes these."""
        before = seen.inputs[scalable.linears[0]]
        expected = before * powers[scalable.channel.to(powers.device)]

        def hook(module: torch.nn.Module, inputs: tuple) -> tuple | None:
            followed.append(_same(inputs[0], expected))
            return (before,) if inputs[0].shape == before.shape else None

        return hook

    with ExitStack() as hooks:
        for scalable in found:
            powers = _powers(scalable.channels, seen.output)
            source = layer.get_submodule(scalable.source)
            hooks.callback(source.register_forward_hook(lambda m, i, out, powers=powers: out * powers).remove)
            for linear in scalable.linears:
                hook = put_back(scalable, powers)
                hooks.callback(layer.get_submodule(linear).register_forward_pre_hook(hook).remove)
        output = stream.call(layer, index)
    return all(followed) and _same(output, seen.output)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether every channel [..., C] agrees within SAME of its largest value; with no tokens they do."""
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    found, expected = found.flatten(0, -2), expected.flatten(0, -2)
    return bool(((found - expected).abs().amax(0) <= SAME * expected.abs().amax(0)).all())
