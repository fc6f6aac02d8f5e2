"""A model folder as a transformers model, also one whose weights are packed: they are unpacked one tensor at a time.

Nothing is written to disk. Names in the files become those in memory by transformers' own rules.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vlmq_vllm.checkpoint import ModuleInfo, TensorInfo, read_config, read_headers, read_modules
from vlmq_vllm.errors import CheckpointError, QuantizeError
from vlmq_vllm.format import PARTS, QuantizedWeight


def is_vlmq(folder: Path) -> bool:
    """Whether config.json says that the weights are packed by vlmq. Raises CheckpointError for a broken folder."""
    found = read_config(folder).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "vlmq"


def load_model(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model of `folder` in evaluation mode. Raises CheckpointError when tensors are missing or misshaped."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": dtype, "output_loading_info": True}
    try:
        if is_vlmq(folder):
            config = AutoConfig.from_pretrained(folder)
            del config.quantization_config
            with torch.device("meta"):
                kind = type(AutoModelForImageTextToText.from_config(config))
            state = packed_state(folder, dtype)
            model, info = kind.from_pretrained(None, config=config, state_dict=state, **options)
        else:
            model, info = AutoModelForImageTextToText.from_pretrained(folder, **options)
    except (CheckpointError, QuantizeError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{folder} has a damaged file ({error}); copy it again from its source") from None
    except Exception as error:  # whatever damaged or unknown models make of transformers
        raise QuantizeError(f"transformers cannot load {folder} ({error!r:.200})") from error
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if wrong:
        raise CheckpointError(f"{folder} has no tensor that fits {wrong[0]}; copy the model again from its source")
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise QuantizeError(f"device {device!r} cannot be used ({str(error).partition(chr(10))[0]})") from None


class Packed:
    """A packed weight that becomes a tensor [O, I] when it is indexed, as a slice of a safetensors file does."""

    def __init__(self, folder: Path, files: dict[str, str], module: ModuleInfo, dtype: torch.dtype) -> None:
        self.folder, self.files, self.module, self.dtype = folder, files, module, dtype

    def get_dtype(self) -> str:
        """In safetensors' spelling."""
        return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[self.dtype]

    def __getitem__(self, index) -> torch.Tensor:
        parts = {}
        for name, file_name in self.files.items():
            with safe_open(self.folder / file_name, "pt") as file:
                parts[name.rpartition(".")[2]] = file.get_tensor(name)
        return QuantizedWeight.from_tensors(self.module.format, parts).dequantize(self.dtype)[index]


def packed_state(folder: Path, dtype: torch.dtype) -> dict[str, object]:
    """Tensor names of a 16-bit model -> what gives the tensor when indexed. Raises CheckpointError."""
    modules, headers = read_modules(folder), read_headers(folder)
    state: dict[str, object] = {}
    files = {file_name: safe_open(folder / file_name, "pt") for file_name in {i.file for i in headers.values()}}
    for name, info in headers.items():
        module, _, part = name.rpartition(".")
        if part not in PARTS:
            state[name] = files[info.file].get_slice(name)
    for module, found in modules.items():
        state[f"{module}.weight"] = Packed(folder, _files_of(module, headers), found, dtype)
    return state


def _files_of(module: str, headers: dict[str, TensorInfo]) -> dict[str, str]:
    """The tensors of a packed weight and the file of each."""
    names = (f"{module}.{part}" for part in PARTS)
    return {name: headers[name].file for name in names if name in headers}
