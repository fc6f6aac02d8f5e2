"""Measures all cases of one weight: packs it for each kernel, copies it, checks the results and times them.

`Setting` and `Clock` are what all weights share: the machine and format, and the time that is left.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from time import monotonic

import torch

from benchmarks.kernel import gpu_timing
from benchmarks.kernel.cases import Block, Case, gigabytes_per_second, group_of
from benchmarks.kernel.contenders import DENSE, KERNELS, OWN
from benchmarks.kernel.gpu_timing import Product
from benchmarks.kernel.int8_activations import Rounded, RoundedOracle
from vlmq_vllm.format import QuantizedWeight, WeightFormat


@dataclass(frozen=True)
class Setting:
    """What all cases share; `l2` in bytes, `copy` in GB/s."""

    device: str
    dtype: torch.dtype
    group_size: int
    symmetric: bool
    l2: int
    copy: float


class Clock:
    """How much time there is, for all and for what each peer does before it can be timed."""

    def __init__(self, deadline: float, peer_seconds: float) -> None:
        self.deadline, self.peer_seconds = deadline, peer_seconds
        self.spent: Counter[str] = Counter()
        self.longest: dict[str, float] = {}

    def count(self, name: str, seconds: float) -> None:
        self.spent[name] += seconds
        self.longest[name] = max(self.longest.get(name, 0), seconds)

    def why_not(self, name: str) -> str | None:
        """Why this kernel gets no further case, or None. What took long before may take as long again."""
        if monotonic() + self.longest.get(name, 0) > self.deadline:
            return "no time left"
        if name not in (*OWN.values(), DENSE) and self.spent[name] > self.peer_seconds:
            return f"its packing, compiling and tuning took {self.peer_seconds:.0f} s"
        return None


class MeasuredWeight:
    """One weight and its packings by kernel, each made once, when it is first needed."""

    def __init__(self, setting: Setting, clock: Clock, block: Block) -> None:
        self.setting, self.clock, self.block = setting, clock, block
        self.products: dict[str, list[Product]] = {}
        self.stored: dict[str, int] = {}  # bytes of a copy
        self.broken: dict[str, str] = {}  # kernels that could not pack this weight

    @cached_property
    def weight(self) -> QuantizedWeight:
        group_size = group_of(self.block.bits, self.setting.group_size)
        format = WeightFormat(self.block.bits, group_size, self.setting.symmetric)
        shape = (self.block.layer.rows, self.block.layer.columns)
        return gpu_timing.draw(format, *shape, self.setting.dtype, self.setting.device)

    @cached_property
    def oracle(self) -> gpu_timing.Oracle:
        return gpu_timing.Oracle(self.weight)

    def measure(self, name: str, case: Case) -> dict:
        """Fields of a line of kind "speed". Raises whatever the kernel does, and Wrong for a wrong result."""
        x = gpu_timing.inputs(case.tokens, case.layer.columns, self.setting.dtype, self.setting.device)
        x, oracle = (Rounded.of(x), RoundedOracle(self.oracle)) if case.activations == 8 else (x, self.oracle)
        began = monotonic()
        try:
            self._prepare(name, x, case)
        finally:
            self.clock.count(name, monotonic() - began)
        products = self.products[name][: self._copies(name, case)]
        timing, error = gpu_timing.measure(products, x, oracle, KERNELS[name].roundings, case.floor)
        found = {"copies": len(products), "stored_bytes": self.stored[name], "error": error}
        return self._fields(case, timing.microseconds) | asdict(timing) | found

    def _prepare(self, name: str, x: torch.Tensor | Rounded, case: Case) -> None:
        """Pack and copy at the first case, and call twice what may compile or tune for this x."""
        if name not in self.products:
            try:
                packed = KERNELS[name].pack(self.weight, self.setting.dtype)
                self.stored[name] = packed.nbytes
                # Fewer tokens move less and need more copies.
                most = self._copies(name, replace(case, tokens=min(self.block.tokens)))
                self.products[name] = packed.products(most)
            except Exception as error:
                self.broken[name] = told(error)
                raise
        for _ in range(2):
            self.products[name][0](x)
        gpu_timing.settle()

    def _copies(self, name: str, case: Case) -> int:
        return gpu_timing.copies_needed(self.stored[name], self._moved(case), self.setting.l2)

    def _moved(self, case: Case) -> int:
        return case.moved_bytes(self.setting.group_size, self.setting.symmetric)

    def _fields(self, case: Case, microseconds: float) -> dict:
        speed = gigabytes_per_second(self._moved(case), microseconds)
        shape = {"layer": case.layer.label, "columns": case.layer.columns, "rows": case.layer.rows}
        return shape | {
            "bits": case.bits,
            "tokens": case.tokens,
            "activations": case.activations,
            "gigabytes_per_second": speed,
            "share": speed / self.setting.copy,
            "teraflops": case.operations / microseconds / 1e6,
            "moved_bytes": self._moved(case),
        }


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
