"""Readers of checkpoints, ours and those of other quantisers that vlmq serves, by the quant_method of their config.

A spec is made by `from_dict(config)` and gives packing and table of modules by `read(folder, headers)`; both raise
CheckpointError. The tensors decide what is quantised and how; ignore lists and patterns of names are not looked at.
"""

from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.foreign.compressed_tensors import PackQuantizedSpec
from vlmq_vllm.foreign.gptq import GPTQSpec

Spec = QuantizationSpec | GPTQSpec | PackQuantizedSpec
SPECS: dict[str, type[Spec]] = {
    "vlmq": QuantizationSpec,
    "gptq": GPTQSpec,
    "auto-round": GPTQSpec,
    "auto_round": GPTQSpec,
    "compressed-tensors": PackQuantizedSpec,
}
