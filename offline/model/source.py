"""Reads the 16-bit model that is quantised: an empty skeleton, and its weights one module at a time.

Weights come from the safetensors files when a module is materialised and go when it is released, so that no more than
one decoder layer is in memory. Where a parameter lies in the files is `file_names.py`'s business.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.utils.hooks import RemovableHandle

from vlmq_vllm.errors import CheckpointError, QuantizeError
from vlmq_vllm.headers import TensorInfo, read_config, read_headers
from vlmq_vllm.offline.model.families import Family, family_of
from vlmq_vllm.offline.model.file_names import StoredParameter, find_stored_parameters
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import move_buffers, set_parameter
from vlmq_vllm.offline.model.rotation import HEAD, Rotation
from vlmq_vllm.offline.model.skeleton import build_skeleton

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
RESIDENT = 1 << 30  # bytes of float32 up to which a tower stays in a CPU's memory while inputs are captured


class Source:
    """A model folder with its skeleton. `model` is on meta but for its buffers; `family` is its row. `quantized`: once
    there is a checkpoint in the making, gives a parameter (by its in-memory name) as written, dequantised, or None."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.family: Family = family_of(self.config)
        self.headers: dict[str, TensorInfo] = read_headers(folder)
        self.model = build_skeleton(folder)
        self.parsed: Any = self.model.config  # config.json as transformers reads it, defaults added
        self.places: dict[str, StoredParameter] = find_stored_parameters(self.model, self.headers)
        self.quantized: Callable[[str], torch.Tensor | None] = lambda name: None
        self.rotation: Rotation | None = None
        self.tied: dict[str, str] = {}  # tensors that a rotation adds -> those in the files that they are made from
        self.parameters_of: dict[str, list[str]] = {}  # of each tensor in the files, once there is a rotation
        self._check_complete()

    def stack(self, name: str) -> torch.nn.ModuleList:
        """The ModuleList of that in-memory name: layers, blocks, or the experts of a layer."""
        return cast(torch.nn.ModuleList, self.model.get_submodule(name))  # as rows of families are tested to say

    def layers(self) -> torch.nn.ModuleList:
        """The decoder's layers."""
        return self.stack(self.family.layers)

    def rotate(self, seed: int, device: torch.device) -> None:
        """From now on be the model whose decoder is turned, with a head of its own. Raises RefusedError for a decoder
        that cannot be."""
        self.rotation = Rotation(self.model, self.family, self.parsed, self._original, seed, device)
        if HEAD not in self.places:
            embeddings = self.places[f"{self.family.embed}.weight"].tensor
            name = "language_model.lm_head.weight" if embeddings.startswith("language_model.model.") else HEAD
            self.places[HEAD] = StoredParameter(name, name.removesuffix(".weight"))
            self.headers = self.headers | {name: self.headers[embeddings]}
            self.tied = {name: embeddings}
        if _tied(self.parsed):
            self.config = _untied(self.config)
        for name, place in self.places.items():
            self.parameters_of.setdefault(place.tensor, []).append(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name in the files, in the dtype in which it is stored; turned where the model is."""
        with safe_open(self.folder / self.headers[name].file, "pt") as file:
            value = file.get_tensor(self.tied.get(name, name))
        if self.rotation is None or name not in self.parameters_of:
            return value
        first, *others = self.parameters_of[name]
        if self.places[first].expert is None:
            return self.rotation(first, value)
        for parameter in (first, *others):  # all experts' parts of a fused tensor
            self.places[parameter].put(value, self.parameter(parameter))
        return value

    def parameter(self, name: str) -> torch.Tensor:
        """The parameter of that in-memory name, in the dtype in which it is stored; turned where the model is."""
        value = self._original(name)
        return value if self.rotation is None else self.rotation(name, value)

    def _original(self, name: str) -> torch.Tensor:
        """The parameter of that in-memory name as it lies in the files."""
        place = self.places[name]
        with safe_open(self.folder / self.headers[place.tensor].file, "pt") as file:
            return replace(place, tensor=self.tied.get(place.tensor, place.tensor)).read(file)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The 16-bit dtype in which the scales of parameter `name` are stored: its own, or bfloat16 for a wider one."""
        return torch.float16 if self.headers[self.places[name].tensor].dtype == "F16" else torch.bfloat16

    def module_in_files(self, name: str) -> str:
        """Name in the files of the linear whose in-memory name is `name`."""
        return self.places[f"{name}.weight"].module

    def materialise(
        self, name: str, device: torch.device, quantized: bool = False, without: str = ""
    ) -> torch.nn.Module:
        """Load the weights of module `name` (in-memory name) as frozen parameters, float32. quantized: what has been
        quantised already as it has been written. without: the name of a module inside it that is left out."""
        module = self.model.get_submodule(name)
        for inner, _ in list(module.named_parameters()):
            full = f"{name}.{inner}"
            if without and full.startswith(without + "."):
                continue
            replaced = self.quantized(full) if quantized else None
            value = self.parameter(full) if replaced is None else replaced
            if not torch.isfinite(value).all():
                found = self.places[full].tensor
                raise QuantizeError(f"{found} holds NaN or infinity; a model with such weights cannot be quantised")
            set_parameter(module, inner, value.to(device, torch.float32))
        move_buffers(module, device)
        return module

    @contextmanager
    def loaded(self, name: str, device: torch.device, quantized: bool = False) -> Iterator[torch.nn.Module]:
        """Module `name` with its weights, for a while; as `materialise` gives it."""
        try:
            yield self.materialise(name, device, quantized=quantized)
        finally:
            self.release(name)

    def release(self, name: str) -> None:
        """Drop the weights of module `name` again."""
        module = self.model.get_submodule(name)
        for inner, parameter in list(module.named_parameters()):
            set_parameter(module, inner, parameter.to("meta"))

    @contextmanager
    def before_decoder(self, device: torch.device, quantized: bool = False) -> Iterator[None]:
        """Embeddings, vision tower and connectors in memory; blocks of a large tower only while each of them runs."""
        family = self.family
        tower = self.model.get_submodule(family.vision)
        resident = device.type != "cpu" or sum(4 * p.numel() for p in tower.parameters()) <= RESIDENT
        handles = [self._lend_embeddings(device)]
        for name in self._others():
            set_parameter(self.model, name, self.parameter(name).to(device, torch.float32))
        move_buffers(self.model, device, without=family.layers)  # such as the decoder's rotary frequencies
        self.materialise(family.vision, device, quantized=quantized, without="" if resident else family.blocks)
        for name in family.connectors:
            self.materialise(name, device, quantized=quantized)
        if not resident:
            for i, block in enumerate(self.stack(family.blocks)):
                name = f"{family.blocks}.{i}"
                handles += [
                    block.register_forward_pre_hook(lambda m, a, n=name: self.lend(n, device, quantized)),
                    block.register_forward_hook(lambda m, a, out, n=name: self.release(n)),
                ]
        try:
            with removing(handles):
                yield
        finally:
            for name in (family.embed, family.vision, *family.connectors):
                self.release(name)
            for name in self._others():
                set_parameter(self.model, name, self.model.get_parameter(name).to("meta"))

    def _others(self) -> list[str]:
        """Parameters outside the decoder's layers, the head and the parts that are loaded as modules: a newline's
        embedding, the final norm."""
        family = self.family
        parts = (family.layers, family.embed, family.vision, *family.connectors, "lm_head")
        return [
            name
            for name, _ in self.model.named_parameters()
            if not name.startswith(tuple(f"{part}." for part in parts))
        ]

    def lend(self, name: str, device: torch.device, quantized: bool) -> None:
        """`materialise` as a hook that gives nothing back."""
        self.materialise(name, device, quantized=quantized)

    def _lend_embeddings(self, device: torch.device) -> RemovableHandle:
        """The table as stored, of which a CPU reads only the rows that are asked for; what comes out is float32."""
        module, name = self.model.get_submodule(self.family.embed), f"{self.family.embed}.weight"
        set_parameter(module, "weight", self._original(name).to(device))
        move_buffers(module, device)
        turn = self.rotation
        return module.register_forward_hook(lambda m, args, out: (turn(name, out) if turn else out).float())

    def _check_complete(self) -> None:
        """Every parameter must be in the files, in its shape and 16 or 32 bits wide; tied ones need be there once."""
        there = {id(p) for name, p in self.model.named_parameters(remove_duplicate=False) if name in self.places}
        tied = _tied(self.parsed)
        for name, parameter in self.model.named_parameters():
            if name not in self.places:
                if id(parameter) in there or name in tied:
                    continue
                raise CheckpointError(f"{self.folder} has no tensor for {name}; copy the model again from its source")
            place = self.places[name]
            info = self.headers[place.tensor]
            if place.shape(info.shape) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{place.tensor} has shape {list(info.shape)}, config.json makes it "
                    f"{list(parameter.shape)}; the model's files do not belong together"
                )
            if info.dtype not in DTYPES:
                raise QuantizeError(f"{place.tensor} is {info.dtype}; start from a model in {'/'.join(DTYPES)}")


def find(model: str) -> Path:
    """Folder of a local model or of a hub name's snapshot (downloaded if need be). Raises QuantizeError."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise QuantizeError(f"{model} is not a folder; give a model's folder or a hub name such as Qwen/Qwen2-VL-2B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QuantizeError(f"{model} is neither a folder here nor to be had from the hub ({reason})") from None


def _untied(config: dict) -> dict:
    """config.json of the same model with a head that is no longer tied to the embeddings."""
    own = {"tie_word_embeddings": False}
    return config | own | {key: config[key] | own for key in ("text_config",) if key in config}


def _tied(config: Any) -> set[str]:
    """Parameters that share another's tensor by config.json, such as lm_head and the input embeddings."""
    tied = getattr(config, "tie_word_embeddings", False) or getattr(config.get_text_config(), "tie_word_embeddings", 0)
    return {"lm_head.weight"} if tied else set()
