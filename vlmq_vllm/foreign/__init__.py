"""Checkpoints of other quantisers that vlmq serves: `SPECS` says who reads a quantization_config, by quant_method.

A spec is parsed from the quantization_config (`from_dict`, raises CheckpointError for what cannot be served) and then
looks at a folder's headers (`read`): the packing and the table of modules. As with our own checkpoints the tensors
decide what is quantised and how; ignore lists and patterns of module names are not looked at.
"""

from vlmq_vllm.foreign.compressed_tensors import PackQuantizedSpec
from vlmq_vllm.foreign.gptq import GPTQSpec

SPECS = {
    "gptq": GPTQSpec,
    "auto-round": GPTQSpec,
    "auto_round": GPTQSpec,
    "compressed-tensors": PackQuantizedSpec,
}
