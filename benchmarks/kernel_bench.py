"""Runs cases of the kernel benchmark: packs a weight for every kernel, has it checked and timed, tells the journal.

A peer may fail in any way of its own; it is listed with its error and the others go on. Our own kernel may not:
`Refused` ends the run.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from time import monotonic

import gpu_timing
import torch
from journal import Journal
from kernel_cases import Block, Case, gigabytes_per_second
from kernel_peers import DENSE, KERNELS, OURS, Product

from vlmq_vllm.format import QuantizedWeight, WeightFormat


class Refused(Exception):
    """Our own kernel gave a wrong result or none; no table may be made."""


class Lost(Exception):
    """A kernel left the GPU in a state in which nothing more can run."""


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
        if name not in (OURS, DENSE) and self.spent[name] > self.peer_seconds:
            return f"its packing, compiling and tuning took {self.peer_seconds:.0f} s"
        return None


class Bench:
    """Runs blocks of cases with the kernels of these names, in this order."""

    def __init__(self, setting: Setting, names: list[str], journal: Journal, clock: Clock) -> None:
        self.setting, self.names, self.journal, self.clock = setting, names, journal, clock
        self.done: set[tuple[str, Case]] = set()

    def preflight(self, blocks: list[Block]) -> None:
        """Ours for every width and number of tokens at the smallest layer. Raises Refused with all that is wrong."""
        layer = min((block.layer for block in blocks), key=lambda layer: layer.rows * layer.columns)
        wrong = []
        for bits in dict.fromkeys(block.bits for block in blocks):
            tokens = dict.fromkeys(count for block in blocks if block.bits == bits for count in block.tokens)
            state = State(self.setting, self.clock, Block(layer, bits, tuple(tokens)))
            for case in state.block.cases:
                try:
                    state.measure(OURS, case)
                except Exception as error:
                    wrong.append(f"{case.label}: {told(error)}")
                    self._settle(OURS, case, wrong)
        if wrong:
            raise Refused("; ".join(wrong))

    def run(self, block: Block) -> None:
        state = State(self.setting, self.clock, block)
        for case in block.cases:
            for name in self.names:
                # The dense product is the same for all widths.
                self._one(name, replace(case, bits=16) if name == DENSE else case, state)

    def _one(self, name: str, case: Case, state: "State") -> None:
        """Measure one kernel and say what came of it."""
        if (name, case) in self.done or KERNELS[name].why_not(state.block.bits, self.setting.symmetric):
            return
        reason = self.clock.why_not(name)
        if reason:
            self.journal.add("skipped", kernel=name, case=case.label, reason=reason)
        elif name in state.broken:
            self.journal.add("failed", kernel=name, case=case.label, reason=state.broken[name])
        else:
            self._try(name, case, state)

    def _try(self, name: str, case: Case, state: "State") -> None:
        try:
            fields = state.measure(name, case)
        except Exception as error:  # of whatever kind; it is quoted, not lost
            if name == OURS:
                raise Refused(f"{case.label}: {told(error)}") from error
            self.journal.add("failed", kernel=name, case=case.label, reason=told(error))
            self._settle(name, case)
        else:
            self.done.add((name, case))
            self.journal.add("speed", kernel=name, **fields)

    def _settle(self, name: str, case: Case, wrong: list[str] | None = None) -> None:
        """After a failure: raises Lost, or Refused with all that is `wrong` with ours, if the GPU will not go on."""
        try:
            gpu_timing.settle()
        except RuntimeError as error:
            reason = f"{name} at {case.label} broke the CUDA context: {told(error)}"
            raise Refused("; ".join([*wrong, reason])) if wrong else Lost(reason) from error


class State:
    """One weight and its packings by kernel, each made once, when it is first needed."""

    def __init__(self, setting: Setting, clock: Clock, block: Block) -> None:
        self.setting, self.clock, self.block = setting, clock, block
        self.products: dict[str, list[Product]] = {}
        self.stored: dict[str, int] = {}  # bytes of a copy
        self.broken: dict[str, str] = {}  # kernels that could not pack this weight

    @cached_property
    def weight(self) -> QuantizedWeight:
        format = WeightFormat(self.block.bits, self.setting.group_size, self.setting.symmetric)
        shape = (self.block.layer.rows, self.block.layer.columns)
        return gpu_timing.draw(format, *shape, self.setting.dtype, self.setting.device)

    @cached_property
    def oracle(self) -> gpu_timing.Oracle:
        return gpu_timing.Oracle(self.weight)

    def measure(self, name: str, case: Case) -> dict:
        """Fields of a line of kind "speed". Raises whatever the kernel does, and Wrong for a wrong result."""
        x = gpu_timing.inputs(case.tokens, case.layer.columns, self.setting.dtype, self.setting.device)
        began = monotonic()
        try:
            self._prepare(name, x, case)
        finally:
            self.clock.count(name, monotonic() - began)
        products = self.products[name][: self._copies(name, case)]
        timing, error = gpu_timing.measure(products, x, self.oracle, KERNELS[name].roundings, case.floor)
        found = {"copies": len(products), "stored_bytes": self.stored[name], "error": error}
        return self._fields(case, timing.microseconds) | asdict(timing) | found

    def _prepare(self, name: str, x: torch.Tensor, case: Case) -> None:
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
            "gigabytes_per_second": speed,
            "share": speed / self.setting.copy,
            "teraflops": case.operations / microseconds / 1e6,
            "moved_bytes": self._moved(case),
        }


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
