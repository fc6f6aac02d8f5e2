"""Readers of other quantisers' checkpoints that vlmq serves, by the quant_method of their quantization_config.

As with our own checkpoints the tensors decide what is quantised and how; ignore lists and patterns of module names are
not looked at.
"""

from pathlib import Path
from typing import Protocol

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.foreign.compressed_tensors import PackQuantizedSpec
from vlmq_vllm.foreign.gptq import GPTQSpec
from vlmq_vllm.headers import TensorInfo
from vlmq_vllm.packing import Packing


class Spec(Protocol):
    """What a quantization_config says, ours (`checkpoint.QuantizationSpec`) or another quantiser's."""

    @classmethod
    def from_dict(cls, config: dict) -> "Spec":
        """Parse and check; raises CheckpointError for what cannot be served."""

    def read(self, folder: Path, headers: dict[str, TensorInfo]) -> tuple[Packing, dict[str, ModuleInfo]]:
        """Packing and table of quantised modules by the headers of `folder`. Raises CheckpointError."""


SPECS: dict[str, type[Spec]] = {
    "gptq": GPTQSpec,
    "auto-round": GPTQSpec,
    "auto_round": GPTQSpec,
    "compressed-tensors": PackQuantizedSpec,
}
