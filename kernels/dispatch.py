"""Multiplies x with the weights of a layer, in the way that should be fastest for the number of tokens.

    up to the crossover   the fused kernel (`gemm.py`), planned in `tiles.py`
    above                 dequantise and cuBLAS (`dequantize.py`), or with activations of 8 bits int8 (`int8.py`)

A fused layer may hold several weights; each writes its columns of the one result. Batch-invariant products use one tile
and one division of K for every number of tokens, so that what a token gets does not depend on its company.
"""

from collections.abc import Sequence

import torch

from vlmq_vllm.kernels import dequantize, gemm, hardware, int8, tiles
from vlmq_vllm.kernels.layout import RuntimeWeight, aligned

# The number of tokens from which activations of 8 bits are multiplied as such. Not measured: a full tile of `int8.py`,
# where the fused kernel is bound by arithmetic already.
INT8_FROM = int8.TILE


def multiply(
    x: torch.Tensor,
    weights: Sequence[RuntimeWeight],
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
    token_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] times all weights plus bias: [..., sum of their rows] in x's dtype.

    `token_scales` [..., 1] float32: x holds integers in [-127, 127], and each token's products are multiplied by its.
    """
    rows = [weight.geometry.rows for weight in weights]
    tokens = aligned(x.reshape(-1, x.shape[-1]))
    each = None if token_scales is None else aligned(token_scales.reshape(-1))
    bias = None if bias is None else aligned(bias)
    out = torch.empty(len(tokens), sum(rows), dtype=x.dtype, device=x.device)
    start = 0
    for weight, count in zip(weights, rows, strict=True):
        part = slice(start, start + count)
        _into(out[:, part], tokens, weight, None if bias is None else bias[part], batch_invariant, each)
        start += count
    return out.view(*x.shape[:-1], start)


def _into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None,
    batch_invariant: bool,
    token_scales: torch.Tensor | None,
) -> None:
    machine = hardware.of(x.device)
    if batch_invariant:
        plan = tiles.plan_for(tiles.INVARIANT, weight.geometry, machine)
        step = tiles.tokens_at_once(plan, weight.geometry)
        for i in range(0, len(x), step):
            each = None if token_scales is None else token_scales[i : i + step]
            gemm.gemm(x[i : i + step], weight, bias, out[i : i + step], plan, each)
    elif len(x) < crossover(machine, token_scales is not None):
        gemm.gemm(x, weight, bias, out, token_scales=token_scales)
    elif token_scales is None:
        dequantize.gemm(x, weight, bias, out)
    else:
        int8.gemm(x, token_scales, weight, bias, out)


def crossover(machine: hardware.Hardware, rounded: bool) -> int:
    """The number of tokens from which the fused kernel is left; `rounded`: activations have 8 bits."""
    return INT8_FROM if rounded else tiles.dequantize_from(machine)
