"""Measures time per launch on a GPU by CUDA graph replay, and checks the result, without which no time counts.

A graph holds many launches, each with the next copy of the weight, so that the copy it reads was pushed out of L2 by
the others. Replays follow each other without a pause, with an event between them; the median over replays, divided by
the launches, is the time. The graph that is timed is the graph that is checked: inputs are drawn anew, all its outputs
filled with NaN, and after a replay they are compared with a float64 product of the dequantised weight.

Everything runs on the caller's current stream, which must not be the default one. Importing this touches no device.
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil
from statistics import median

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat

L2_TIMES = 4  # what is moved between two readings of a copy, in sizes of L2
COPIES_LIMIT = 2 << 30  # bytes that the copies of one weight may take together
GRAPH_MICROSECONDS, GRAPH_LAUNCHES = 1000, 64  # of one graph: enough that its own start hardly counts
SAMPLE = 256  # rows of the weight, and of x, whose products are compared

Product = Callable[[torch.Tensor], torch.Tensor]


class Wrong(Exception):
    """A kernel's result is not the product."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per launch: median, least and most over the replays."""

    microseconds: float
    low: float
    high: float
    launches: int
    replays: int


def copies_needed(weight: int, moved: int, l2: int) -> int:
    """How many copies of a weight of `weight` bytes to rotate when one product moves `moved` bytes."""
    return max(1, min(ceil(L2_TIMES * l2 / moved), COPIES_LIMIT // weight))


def launches_needed(copies: int, floor: float) -> int:
    """Launches in a graph, whole rounds of the copies; `floor` is about the least microseconds of one.

    It does not ask how fast the kernel is, so that the graphs of all kernels are alike.
    """
    wanted = min(ceil(GRAPH_MICROSECONDS / floor), GRAPH_LAUNCHES)
    return copies * ceil(wanted / copies)


@cache
def generator(device: torch.device | str) -> torch.Generator:
    """Random numbers of our own: a capture that failed may leave torch 2.11's generator unusable."""
    return torch.Generator(device).manual_seed(torch.initial_seed())


def inputs(tokens: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Random x [tokens, columns]."""
    return torch.randn(tokens, columns, device=device, generator=generator(device)).to(dtype)


def permutation(count: int, device: torch.device | str) -> torch.Tensor:
    return torch.randperm(count, device=device, generator=generator(device))


def draw(format: WeightFormat, rows: int, columns: int, dtype: torch.dtype, device: str) -> QuantizedWeight:
    """Random codes and zero points, scales that make weights of about one half."""
    shape = (rows, format.groups(columns))
    like = {"device": device, "generator": generator(device)}
    codes = torch.randint(0, format.levels, (rows, columns), dtype=torch.uint8, **like)
    zero = None if format.symmetric else torch.randint(0, format.levels, shape, dtype=torch.uint8, **like)
    scale = (torch.rand(shape, **like) + 0.5) / format.levels
    return QuantizedWeight(format, codes, scale.to(dtype), zero)


class Oracle:
    """The exact product for some random rows of a weight [N, K]."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.shape = weight.codes.shape
        self.rows = permutation(self.shape[0], weight.codes.device)[:SAMPLE]
        zero = None if weight.zero is None else weight.zero[self.rows]
        some = QuantizedWeight(weight.format, weight.codes[self.rows], weight.scale[self.rows], zero)
        self.weight = some.dequantize(torch.float32).double()

    def check(self, x: torch.Tensor, outs: list[torch.Tensor], roundings: int) -> float:
        """Largest relative RMS error of the outputs [M, N] for x [M, K]; raises Wrong above `bound` or for NaN."""
        rows, columns = self.shape
        tokens = permutation(x.shape[0], x.device)[:SAMPLE]
        exact = x[tokens].double() @ self.weight.T
        limit = bound(x.dtype, columns, roundings)
        errors = []
        for out in outs:
            if out.shape != (x.shape[0], rows):
                raise Wrong(f"its output is {list(out.shape)}, not {[x.shape[0], rows]}")
            if not torch.isfinite(out).all():
                raise Wrong("NaN or infinity is left in its output")
            errors.append(((out[tokens][:, self.rows].double() - exact).norm() / exact.norm()).item())
            if not errors[-1] <= limit:
                raise Wrong(f"its relative RMS error is {errors[-1]:.2e}, above {limit:.2e}")
        return max(errors)


def bound(dtype: torch.dtype, columns: int, roundings: int) -> float:
    """How far a product may lie from the exact one, as relative RMS.

    Rounding to `dtype` moves no element by more than half a step, eps / 2; `roundings` is 1 for the result alone and 2
    where the weight is rounded before the product, too. Each of `columns` float32 sums loses up to 2^-23 (tensor cores
    cut instead of rounding); losses of random sign add up like sqrt(columns), and the factor 2 is the room for them
    not being quite so.
    """
    return roundings * torch.finfo(dtype).eps / 2 + 2 * columns**0.5 * 2**-23


def measure(
    products: list[Product], x: torch.Tensor, oracle: Oracle, roundings: int, floor: float, seconds: float = 0.1
) -> tuple[Timing, float]:
    """Time of a launch and its relative error; `products`, one for each copy of the weight, were called before."""
    graph, outs = capture(products, x, launches_needed(len(products), floor))
    x.normal_(generator=generator(x.device))
    for out in outs:
        out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    # Further rounds are the same launches with the same copies again, so each copy's first is enough.
    error = oracle.check(x, outs[: len(products)], roundings)
    return replay(graph, len(outs), seconds), error


def capture(products: list[Product], x: torch.Tensor, launches: int) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of launches, and their outputs. What compiles or tunes at a first call must be called before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not `with torch.cuda.graph`, which collects garbage and empties the allocator's cache every time. But no garbage
    # may be collected while capturing: an older graph could be among it.
    gc.disable()
    graph.capture_begin()
    try:
        outs = [products[i % len(products)](x) for i in range(launches)]
    except Exception:
        with suppress(RuntimeError):  # the capture is broken; what broke it says more
            graph.capture_end()
        raise
    finally:
        gc.enable()
    graph.capture_end()
    return graph, outs


def replay(graph: torch.cuda.CUDAGraph, launches: int, seconds: float = 0.1) -> Timing:
    """Replays for about `seconds`, between 10 and 100 of them after a few uncounted ones."""
    count = min(max(int(seconds * 1e6 / median(_spans(graph, 3))), 10), 100)
    spans = [span / launches for span in _spans(graph, count)]
    return Timing(median(spans), min(spans), max(spans), launches, count)


def _spans(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Microseconds of each of `count` replays in a row.

    One replay before and one after them keep the GPU busy, so that no span holds the time the host takes to start.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in pairwise(events)]


def settle() -> None:
    """Wait for all launches; raises what they did wrong."""
    torch.cuda.synchronize()


def release() -> None:
    """Give back the memory of graphs and weights that are gone."""
    torch.cuda.empty_cache()
