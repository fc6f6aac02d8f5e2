"""Records which quantised modules have found their vLLM layer, logs a table of them, and refuses to leave any out."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from vllm.logger import init_logger

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.format import WeightFormat

logger = init_logger(f"vllm.{__name__}")

WITHOUT_LAYER = "vLLM builds no quantisable layer for it"
SHOWN = 5


class Claims:
    """Kept while a process builds its layers.

    reasons: why vLLM takes no packed weight for a module, where known. missing: layers without any weight in the files.
    activation_bits: of the inputs of quantised modules.
    """

    def __init__(self, activation_bits: int = 16) -> None:
        self.activation_bits = activation_bits
        self.reasons: dict[str, str] = {}
        self.claimed: set[str] = set()
        self.missing: list[str] = []
        self.rows: Counter[tuple[str, str]] = Counter()
        self.partial = False
        self.complete = False

    def add(self, prefix: str, shards: Iterable[tuple[str, ModuleInfo | None]] = (("", None),)) -> None:
        """The layer `prefix` takes these modules; None stands for a part, or without any the whole, at 16 bits."""
        shards = list(shards)
        self.claimed.update(name for name, info in shards if info)
        bits = self.activation_bits
        formats = dict.fromkeys("16" if info is None else describe(info.format, bits) for _, info in shards)
        self.rows[re.sub(r"\.\d+(?=\.|$)", ".*", prefix), " | ".join(formats)] += 1

    def finish(self, modules: Mapping[str, ModuleInfo]) -> None:
        """Log the table once per process, before the first weight is loaded or by the first finished layer. Raises
        ValueError for modules without a layer, unless this process builds a part of the model only."""
        if self.complete:
            return
        self.complete = True
        logger.info("vlmq: %d of %d quantised weights in this process\n%s", len(self.claimed), len(modules), self)
        if self.missing:
            raise ValueError(
                f"the checkpoint has no weight for {len(self.missing)} of vLLM's layers: "
                f"{', '.join(self.missing[:SHOWN])}; copy it again or quantise anew"
            )
        unclaimed = sorted(set(modules) - self.claimed)
        if not unclaimed:
            return
        if not self.partial:
            named = ", ".join(f"{name} ({self.reasons.get(name, WITHOUT_LAYER)})" for name in unclaimed[:SHOWN])
            raise ValueError(
                f"{len(unclaimed)} of {len(modules)} quantised modules find no place in vLLM: {named}; quantise again "
                "without them"
            )
        without = "vlmq: no layer in this process (a pipeline stage or a draft model?) for %d quantised modules: %s"
        logger.info(without, len(unclaimed), ", ".join(unclaimed[:SHOWN]))

    def note_partial(self) -> None:
        """With pipeline stages or a draft model a process builds some of the modules and need not claim all."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None:
            staged = config.parallel_config.pipeline_parallel_size > 1
            self.partial = self.partial or staged or config.speculative_config is not None

    def __str__(self) -> str:
        """One line for layers that differ in their number only: bits, how many, and their name."""
        width = max((len(text) for _, text in self.rows), default=0)
        return "\n".join(f"  {text:<{width}} {count:>4} x {name}" for (name, text), count in self.rows.items())


def describe(format: WeightFormat, activation_bits: int = 16) -> str:
    """Width, grouping and grid in a word, such as "W3 g128 asym"; "W4A8 g128" where inputs are rounded to 8 bits."""
    inputs = "" if activation_bits == 16 else f"A{activation_bits}"
    group = "row" if format.group_size == -1 else f"g{format.group_size}"
    return f"W{format.bits}{inputs} {group}{'' if format.symmetric else ' asym'}"
