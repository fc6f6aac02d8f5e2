"""Readers of checkpoints, ours and those of other quantisers that vlmq serves, by the quant_method of their config.

A spec is made by `from_dict(config)` and gives packing and table of modules by `read(folder, headers)`; both raise
CheckpointError. The tensors decide what is quantised and how; ignore lists and patterns of names are not looked at.
"""

from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.errors import CheckpointError
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


def spec_of(config: object) -> Spec:
    """What a quantization_config says. Raises CheckpointError for that of a method which vlmq does not read."""
    method = str(config.get("quant_method")).lower() if isinstance(config, dict) else None
    if not isinstance(config, dict) or method not in SPECS:
        raise CheckpointError(f"the model is quantised with {method!r}; vlmq reads {', '.join(SPECS)}")
    return SPECS[method].from_dict(config)
