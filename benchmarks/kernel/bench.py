"""Runs the cases of the kernel benchmark one after the other, and writes into the journal what came of each.

A peer may fail in any way of its own; it is listed with its error and the others go on. Our own kernels may not:
`Refused` ends the run.
"""

from dataclasses import replace

from benchmarks.journal import Journal
from benchmarks.kernel import gpu_timing
from benchmarks.kernel.cases import Block, Case
from benchmarks.kernel.contenders import DENSE, KERNELS, OWN
from benchmarks.kernel.measured_weight import Clock, MeasuredWeight, Setting, told


class Refused(Exception):
    """Our own kernel gave a wrong result or none; no table may be made."""


class Lost(Exception):
    """A kernel left the GPU in a state in which nothing more can run."""


class Bench:
    """Runs blocks of cases with the kernels of these names, in this order."""

    def __init__(self, setting: Setting, names: list[str], journal: Journal, clock: Clock) -> None:
        self.setting, self.names, self.journal, self.clock = setting, names, journal, clock
        self.done: set[tuple[str, Case]] = set()

    def preflight(self, blocks: list[Block]) -> None:
        """Ours for every width and number of tokens at the smallest layer. Raises Refused with all that is wrong."""
        layer = min((block.layer for block in blocks), key=lambda layer: layer.rows * layer.columns)
        tokens: dict[tuple[int, int], dict[int, None]] = {}  # by bits and those of activations, each once
        for block in blocks:
            tokens.setdefault((block.bits, block.activations), {}).update(dict.fromkeys(block.tokens))
        wrong: list[str] = []
        for (bits, activations), counts in tokens.items():
            self._look(MeasuredWeight(self.setting, self.clock, Block(layer, bits, tuple(counts), activations)), wrong)
        if wrong:
            raise Refused("; ".join(wrong))

    def _look(self, weight: MeasuredWeight, wrong: list[str]) -> None:
        """Ours in every case of a block; what is wrong is added to the list."""
        name = OWN[weight.block.activations]
        for case in weight.block.cases:
            try:
                weight.measure(name, case)
            except Exception as error:
                wrong.append(f"{case.label}: {told(error)}")
                self._settle(name, case, wrong)

    def run(self, block: Block) -> None:
        weight = MeasuredWeight(self.setting, self.clock, block)
        for case in block.cases:
            for name in self.names:
                self._one(name, seen(name, case), weight)

    def _one(self, name: str, case: Case, weight: MeasuredWeight) -> None:
        """Measure one kernel and say what came of it."""
        block = weight.block
        without = KERNELS[name].why_not(block.bits, self.setting.symmetric, block.activations)
        if without or (name, case) in self.done:
            return
        reason = self.clock.why_not(name)
        if reason:
            self.journal.add("skipped", kernel=name, case=case.label, reason=reason)
        elif name in weight.broken:
            self.journal.add("failed", kernel=name, case=case.label, reason=weight.broken[name])
        else:
            self._try(name, case, weight)

    def _try(self, name: str, case: Case, weight: MeasuredWeight) -> None:
        try:
            fields = weight.measure(name, case)
        except Exception as error:  # of whatever kind; it is quoted, not lost
            if name in OWN.values():
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


def seen(name: str, case: Case) -> Case:
    """The case as this kernel has it: the dense product is the same for all widths, and x what it takes."""
    return replace(case, bits=16 if name == DENSE else case.bits, activations=max(KERNELS[name].activations))
