"""Finds which linears of a layer share their inputs, and in which order they run, by one forward pass.

A group is a set of linears that read the same tensor (q, k, v; gate, up). A stage is a set of groups that are collected
in one pass over the data: alone in a dense layer, in a mixture of experts the same group of every expert.
"""

import os
import re
from dataclasses import replace
from itertools import groupby

import torch

from vlmq_vllm.offline.model.layers import linears_of
from vlmq_vllm.offline.model.streams import Stream, noting

Group = tuple[str, ...]


@torch.no_grad()
def find_stages(layer: torch.nn.Module, index: int, stream: Stream) -> list[list[Group]]:
    """The stages of layer `index` in the order in which they run. Raises RuntimeError for a linear that does not."""
    names = linears_of(layer)
    with noting(layer, names, lambda args, kwargs, out: args[0]) as inputs:
        replace(stream, rounded=frozenset()).call(layer, index)  # rounding would make a tensor of each reader's own
    if idle := set(names) - inputs.keys():
        raise RuntimeError(f"{sorted(idle)[0]} takes no part in the forward pass of its layer")
    stages: dict[tuple[str, ...], list[Group]] = {}
    for _, run in groupby(inputs, key=lambda name: id(inputs[name])):  # readers of one tensor run one after the other
        group = tuple(run)
        stages.setdefault(tuple(re.sub(r"\.\d+\.", ".*.", name) for name in group), []).append(group)
    return list(stages.values())


def inspected(group: Group) -> str:
    """The module by whose output a group is judged: the common parent of several linears, else the linear itself."""
    return ".".join(os.path.commonprefix([linear.split(".") for linear in group]))
