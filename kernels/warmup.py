"""Launches once, when a layer has been loaded, every kernel that it can need.

Triton compiles a kernel at its first launch with new properties of the arguments. That must have happened before a CUDA
graph is captured and before requests wait for it; vLLM's `--jit-monitor-mode=error` holds us to that. Properties follow
from a layer's sizes and from the way that a number of tokens takes; layers of the same sizes share a launch.
"""

from collections.abc import Sequence

import torch

from vlmq_vllm.kernels import hardware, tiles, workspace
from vlmq_vllm.kernels.dispatch import crossover, multiply
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.experts import multiply as multiply_experts
from vlmq_vllm.kernels.layout import RuntimeWeight

_done: set[tuple] = set()


def warm(
    weights: Sequence[RuntimeWeight],
    dtype: torch.dtype,
    with_bias: bool,
    batch_invariant: bool = False,
    rounded: bool = False,
) -> None:
    """Launch whatever `multiply` may take for these weights, with bias also without (ranks differ); `rounded`:
    activations have 8 bits."""
    device = weights[0].packed.device
    layer = tuple((weight.geometry, weight.scales.dtype) for weight in weights)
    key = (device, layer, dtype, with_bias, batch_invariant, rounded)
    if key in _done:
        return
    workspace.reserve(device)
    rows = sum(weight.geometry.rows for weight in weights)
    biases = (None, torch.zeros(rows, dtype=dtype, device=device)) if with_bias else (None,)
    machine = hardware.of(device)
    for m in tokens(machine, crossover(machine, rounded)):
        x = torch.zeros(m, weights[0].geometry.columns, dtype=dtype, device=device)
        token_scales = torch.zeros(m, 1, device=device) if rounded else None
        for bias in biases:
            multiply(x, weights, bias, batch_invariant, token_scales)
    _done.add(key)


def warm_experts(experts: ExpertWeights, each: int, dtype: torch.dtype, with_router: bool) -> None:
    """Launch whatever `experts.multiply` may take, without bias, for tokens that go to `each` experts."""
    device, count = experts.packed.device, len(experts)
    key = (device, experts.geometry, experts.scales.dtype, count, each, dtype, with_router)
    if key in _done:
        return
    for bucket in tiles.BUCKETS:
        m = -(-bucket * count // each)
        x = torch.zeros(m, experts.geometry.columns, dtype=dtype, device=device)
        ids = torch.zeros(m, each, dtype=torch.int32, device=device)
        router = torch.zeros(m, each, device=device) if with_router else None
        multiply_experts(x, experts, ids, None, router)
    _done.add(key)


def tokens(machine: hardware.Hardware, many: int | None = None) -> list[int]:
    """Numbers of tokens that between them take every way: one of each bucket, of each number of tiles of the last one,
    and `many`, the first for which the fused kernel is left (by default that of activations at 16 bits)."""
    last, many = tiles.BUCKETS[-1], many or crossover(machine, rounded=False)
    return sorted({*(m for m in tiles.BUCKETS if m < many), *range(2 * last, many, last), many - 1, many})
