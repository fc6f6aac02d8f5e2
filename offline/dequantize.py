"""`vlmq dequantize`: the same model in 16 bits, for software that knows nothing of vlmq and for comparisons.

Every packed weight becomes scale * (code - zero), computed in float32 and rounded once to the scale's dtype; all other
tensors and files stay. What vLLM answers from this twin is what it must answer from the quantised checkpoint.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from vlmq_vllm.checkpoint import read_config, read_headers, read_modules
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.offline.writer import Writer


def dequantize(folder: Path, out: Path) -> None:
    """Write the 16-bit twin of the vlmq checkpoint `folder` to the new folder `out`. Raises CheckpointError."""
    modules = read_modules(folder)
    headers = read_headers(folder)
    config = read_config(folder)
    del config["quantization_config"]
    size = sum((folder / name).stat().st_size for name in {info.file for info in headers.values()})
    packed = sum(2 * module.rows * module.columns for module in modules.values())
    files = sorted({info.file for info in headers.values()})
    with Writer(out, size + packed, files) as writer:
        for file_name in files:
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(folder / file_name, "pt") as file:
                for name in file.keys():  # noqa: SIM118, safe_open is not iterable
                    module, _, part = name.rpartition(".")
                    if part not in PARTS:
                        tensors[name] = file.get_tensor(name)
                    elif part == "weight_packed":
                        tensors[f"{module}.weight"] = _weight(folder, headers, module, modules[module].format)
            writer.add(file_name, tensors)
        writer.finish(folder, config, {"dequantized_from": str(folder.name)})


def _weight(folder, headers, module, format) -> torch.Tensor:
    parts = {}
    for part in PARTS:
        if (info := headers.get(f"{module}.{part}")) is not None:
            with safe_open(folder / info.file, "pt") as file:
                parts[part] = file.get_tensor(f"{module}.{part}")
    return QuantizedWeight.from_tensors(format, parts).dequantize(parts["weight_scale"].dtype)
