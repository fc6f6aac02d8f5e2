"""The 16-bit model that is quantised: an empty skeleton of it, and its weights, one module at a time.

The skeleton is transformers' own model class on the meta device. Weights come from the safetensors files when a module
is materialised and go when it is released, so that no more than one decoder layer is in memory. transformers renames
modules in memory (`model.layers` in a file may be `model.language_model.layers`); its own rules give the way from one
to the other, and what is written keeps the files' names.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from vlmq_vllm.checkpoint import TensorInfo, read_config, read_headers
from vlmq_vllm.errors import CheckpointError, QuantizeError
from vlmq_vllm.offline.models import Family, family_of

DTYPES = ("F16", "BF16", "F32")


def find(model: str) -> Path:
    """Folder of a local model or of a hub name's snapshot (downloaded if need be). Raises QuantizeError."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise QuantizeError(f"{model} is not a folder; give a model's folder or a hub name such as Qwen/Qwen2-VL-2B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QuantizeError(f"{model} is neither a folder here nor to be had from the hub ({reason})") from None


class Source:
    """A model folder with its skeleton. `model` is on meta but for its buffers; `family` is its row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.family: Family = family_of(self.config)
        self.headers: dict[str, TensorInfo] = read_headers(folder)
        self.model = _skeleton(folder)
        self.file_name = _file_names(self.model, self.headers)
        self._check_complete()

    def layers(self) -> torch.nn.ModuleList:
        return self.model.get_submodule(self.family.layers)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name in the files, as stored."""
        with safe_open(self.folder / self.headers[name].file, "pt") as file:
            return file.get_tensor(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The 16-bit dtype in which the scales of weight `name` are stored: its own, or bfloat16 for a wider one."""
        return torch.float16 if self.headers[name].dtype == "F16" else torch.bfloat16

    def materialise(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Load the weights of module `name` (in-memory name) as frozen parameters of `dtype`."""
        module = self.model.get_submodule(name)
        for inner, _ in list(module.named_parameters()):
            owner, _, leaf = inner.rpartition(".")
            file_name = self.file_name[f"{name}.{inner}"]
            value = self.read(file_name)
            if not torch.isfinite(value).all():
                raise QuantizeError(f"{file_name} holds NaN or infinity; a model with such weights cannot be quantised")
            frozen = torch.nn.Parameter(value.to(device, dtype), requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, frozen)
        for inner, buffer in list(module.named_buffers()):
            owner, _, leaf = inner.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        return module

    def release(self, name: str) -> None:
        """Drop the weights of module `name` again."""
        module = self.model.get_submodule(name)
        for inner, parameter in list(module.named_parameters()):
            owner, _, leaf = inner.rpartition(".")
            empty = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, empty)

    def _check_complete(self) -> None:
        """Every parameter must be in the files, in its shape and 16 or 32 bits wide; tied ones need be there once."""
        there = {id(p) for name, p in self.model.named_parameters(remove_duplicate=False) if name in self.file_name}
        tied = _tied(self.model)
        for name, parameter in self.model.named_parameters():
            if name not in self.file_name:
                if id(parameter) in there or name in tied:
                    continue
                raise CheckpointError(f"{self.folder} has no tensor for {name}; copy the model again from its source")
            info = self.headers[self.file_name[name]]
            if info.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self.file_name[name]} has shape {list(info.shape)}, config.json makes it "
                    f"{list(parameter.shape)}; the model's files do not belong together"
                )
            if info.dtype not in DTYPES:
                raise QuantizeError(f"{self.file_name[name]} is {info.dtype}; start from a model in {'/'.join(DTYPES)}")


def _tied(model: torch.nn.Module) -> set[str]:
    """Parameters that share another's tensor by config.json, such as lm_head and the input embeddings."""
    config = model.config
    tied = getattr(config, "tie_word_embeddings", False) or getattr(config.get_text_config(), "tie_word_embeddings", 0)
    return {"lm_head.weight"} if tied else set()


def _skeleton(folder: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a damaged config.json makes of transformers
        reason = str(error).partition("\n")[0]
        raise QuantizeError(
            f"transformers cannot build the model that {folder}/config.json describes ({reason})"
        ) from error
    for module in model.modules():  # rotary frequencies are computed from the config and are in no file
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if lost:
            for name in lost:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
    return model.eval()


def _file_names(model: torch.nn.Module, headers: dict[str, TensorInfo]) -> dict[str, str]:
    """In-memory parameter name -> name in the files, by transformers' rules for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    empty = model.state_dict()
    names = {}
    for name in headers:
        renamed, converted = rename_source_key(name, renamings, others, model.base_model_prefix, empty)
        if converted is None:
            names[renamed] = name
    return names
