"""Finds from how many tokens on another way of multiplying is faster than the fused kernel: `tune.py --crossover`.

    16 bits of activations   dequantising, then cuBLAS (`kernels/dequantize.py`)
    8 bits                   int8 tensor cores (`kernels/int8.py`); the fused kernel multiplies integers as floats

Of one weight it is the least number of tokens tried at which, and at all greater ones, the other way is faster. Of
many it is the median. A way whose result is wrong ends the run: `gpu_timing.py` measures, and checks what it measures.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median

import torch

from benchmarks.kernel import gpu_timing
from benchmarks.kernel.int8_activations import Rounded, RoundedOracle
from vlmq_vllm.kernels import dequantize, gemm, int8
from vlmq_vllm.kernels.dispatch import INT8_FROM
from vlmq_vllm.kernels.layout import RuntimeWeight

TOKENS = (192, 256, 384, 512, 768, 1024, 1536, 2048)
INT8_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
FLOOR = 1000.0  # microseconds, so that a graph holds every copy once
SECONDS = 0.01  # of replays for one way


@dataclass(frozen=True)
class Drawn:
    """A weight in as many copies as it takes to find none of them in the second-level cache."""

    label: str
    copies: list[RuntimeWeight]
    oracle: gpu_timing.Oracle


def dequantize_from(weights: Iterable[Drawn]) -> int:
    """The median over weights; one for which dequantising is never faster counts with the most tokens tried."""
    found = []
    for weight in weights:
        tokens = first(TOKENS, partial(dequantising_wins, weight))
        print(f"{weight.label}: dequantising {told(tokens, TOKENS)}", flush=True)
        found.append(TOKENS[-1] if tokens is None else tokens)
    return int(median(found))


def int8_from(weights: Iterable[Drawn]) -> int | None:
    """The median over weights, None if that is beyond what was tried; tells it, too."""
    found = []
    for weight in weights:
        tokens = first(INT8_TOKENS, partial(int8_wins, weight))
        print(f"{weight.label}A8: int8 {told(tokens, INT8_TOKENS)}", flush=True)
        found.append(inf if tokens is None else tokens)
    middle = None if median(found) == inf else int(median(found))
    print(f"int8 {told(middle, INT8_TOKENS)} (median); kernels/dispatch.py has INT8_FROM = {INT8_FROM}", flush=True)
    return middle


def told(tokens: int | None, counts: Sequence[int]) -> str:
    return f"is not faster at {counts[-1]} tokens" if tokens is None else f"is faster from {tokens} tokens on"


def first(counts: Sequence[int], wins: Callable[[int], bool]) -> int | None:
    """The least of the ascending counts from which on all win, or None."""
    slower = [m for m in counts if not wins(m)]
    return next((m for m in counts if m > max(slower, default=0)), None)


def dequantising_wins(weight: Drawn, m: int) -> bool:
    x = tokens_for(weight, m)
    fused, other = (microseconds(product, weight, x, weight.oracle) for product in (gemm.gemm, dequantize.gemm))
    return other < fused


def int8_wins(weight: Drawn, m: int) -> bool:
    x, oracle = Rounded.of(tokens_for(weight, m)), RoundedOracle(weight.oracle)

    def fused(x: Rounded, weight: RuntimeWeight) -> torch.Tensor:
        return gemm.gemm(x.q, weight, token_scales=x.scales[:, 0])

    def by_int8(x: Rounded, weight: RuntimeWeight) -> torch.Tensor:
        return int8.gemm(x.q, x.scales[:, 0], weight)

    return microseconds(by_int8, weight, x, oracle) < microseconds(fused, weight, x, oracle)


def tokens_for(weight: Drawn, m: int) -> torch.Tensor:
    """Random x [m, K]."""
    one = weight.copies[0]
    return gpu_timing.inputs(m, one.geometry.columns, one.scales.dtype, one.scales.device)


def microseconds(
    product: Callable[..., torch.Tensor],
    weight: Drawn,
    x: torch.Tensor | Rounded,
    oracle: gpu_timing.Oracle | RoundedOracle,
) -> float:
    """Of a launch of product(x, weight); the first one, which compiles, is not counted."""
    product(x, weight.copies[0])
    ways = [lambda x, copy=copy: product(x, copy) for copy in weight.copies]
    return gpu_timing.measure(ways, x, oracle, 2, FLOOR, SECONDS)[0].microseconds
