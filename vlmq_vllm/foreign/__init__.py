"""Readers of other quantisers' checkpoints that vlmq serves, by the quant_method of their quantization_config.

As with our own checkpoints the tensors decide what is quantised and how; ignore lists and patterns of module names are
not looked at.
"""

from vlmq_vllm.foreign.compressed_tensors import PackQuantizedSpec
from vlmq_vllm.foreign.gptq import GPTQSpec

SPECS = {
    "gptq": GPTQSpec,
    "auto-round": GPTQSpec,
    "auto_round": GPTQSpec,
    "compressed-tensors": PackQuantizedSpec,
}
