"""Finds which linears of a layer share their inputs, and in which order they run, by one forward pass.

A group is a set of linears that read the same tensor (q, k, v; gate, up); its members can share one Hessian. A stage
is a set of groups that are collected in one pass over the data: alone in a dense layer, in a mixture of experts the
same group of every expert.
"""

import re
from dataclasses import replace

import torch

from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import linears_of
from vlmq_vllm.offline.model.streams import Stream

Group = tuple[str, ...]


@torch.no_grad()
def find_stages(layer: torch.nn.Module, index: int, stream: Stream) -> list[list[Group]]:
    """The stages of layer `index` in the order in which they run. Raises RuntimeError for a linear that does not."""
    order: list[tuple[str, torch.Tensor]] = []
    names = linears_of(layer)
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: order.append((name, args[0])))
        for name in names
    ]
    with removing(handles):
        replace(stream, rounded=frozenset()).call(layer, index)  # rounding would make a tensor of each reader's own
    groups: list[list[str]] = []
    last = None
    for name, inputs in order:
        if inputs is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = inputs
    if idle := set(names) - {name for name, _ in order}:
        raise RuntimeError(f"{sorted(idle)[0]} takes no part in the forward pass of its layer")
    stages: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        stages.setdefault(tuple(re.sub(r"\.\d+\.", ".*.", name) for name in group), []).append(tuple(group))
    return list(stages.values())


def inspected(group: Group) -> str:
    """The module by whose output a group is judged: the common parent of several linears, else the linear itself."""
    if len(group) == 1:
        return group[0]
    common = []
    for parts in zip(*(linear.split(".") for linear in group), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
