"""Defines what a kernel is to the benchmark: a function that packs a weight, and the cases it can take part in.

`pack(weight, dtype)` brings a `QuantizedWeight` on a GPU into the kernel's own packing. The result names the tensors
that hold the weight, of which the benchmark makes copies, and binds a copy to a product x [M, K] -> [M, N]. Kernels for
activations of 8 bits get x as `Rounded`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from benchmarks.kernel.gpu_timing import Product
from vlmq_vllm.format import QuantizedWeight

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """`bind(copy)` is the product with a copy of `tensors`, all on the current stream."""

    tensors: Tensors
    bind: Callable[[Tensors], Product]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def products(self, copies: int) -> list[Product]:
        """One for each of so many copies."""
        clones = [{name: tensor.clone() for name, tensor in self.tensors.items()} for _ in range(copies)]
        return [self.bind(clone) for clone in clones]


@dataclass(frozen=True)
class Kernel:
    """operators: of torch.ops._C; roundings: to 16 bits on the way to the result, see `gpu_timing.bound`.

    activations: bits of those in whose cases it is measured. It takes the widest itself: one with 16 and 8 stands
    beside products of 8 bits with activations that are left as they are.
    """

    title: str
    bits: tuple[int, ...]
    pack: Callable[[QuantizedWeight, torch.dtype], Packed]
    modules: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    asymmetric: bool = False
    roundings: int = 2
    activations: tuple[int, ...] = (16,)

    def why_absent(self) -> str | None:
        """Why this process cannot run it, or None. Imports what it needs."""
        for module in self.modules:
            try:
                import_module(module)
            except Exception as error:  # a peer may fail in any way of its own; the report quotes it
                return f"import {module}: {type(error).__name__}: {error}"
        missing = [name for name in self.operators if not hasattr(torch.ops._C, name)]
        return f"this vLLM has no operator {', '.join(missing)}" if missing else None

    def why_not(self, bits: int, symmetric: bool, activations: int = 16) -> str | None:
        """Why it has no part in a case, or None."""
        if activations not in self.activations:
            return f"takes activations of {' or '.join(map(str, self.activations))} bits"
        if bits not in self.bits:
            return f"takes {' or '.join(map(str, self.bits))} bits"
        return None if symmetric or self.asymmetric else "is called with symmetric weights only"
