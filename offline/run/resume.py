"""Lets a run go on where another was stopped: proof that both are the same run, and what it has written."""

import hashlib
from collections.abc import Callable

import torch
import transformers
from safetensors import safe_open

import vlmq_vllm
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.offline.checkpoint.writer import WEIGHTS, Parts
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import Target, Unit, parents_of
from vlmq_vllm.offline.settings.quantize import Settings


def identity(
    source: Source, settings: Settings, fingerprints: list[str], device: torch.device, ranks: Ranks
) -> dict[str, object]:
    """What decides the bytes of the checkpoint. `fingerprints`: of the calibration samples."""
    model = hashlib.sha256(repr(sorted(source.headers.items())).encode())
    # small files whole: configuration, processor, tokenizer and template decide what the model sees
    for path in sorted(path for path in source.folder.iterdir() if path.is_file()):
        model.update(f"{path.name} {path.stat().st_size}".encode())
        model.update(str(path.stat().st_mtime_ns).encode() if path.suffix in WEIGHTS else path.read_bytes())
    return {
        "model": model.hexdigest(),
        "data": hashlib.sha256("".join(fingerprints).encode()).hexdigest(),
        "version": vlmq_vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": ranks.size,
        **settings.to_dict(),
        "modules": [list(item) for item in settings.modules.items()],  # of two patterns the later one wins
    }


def reader(parts: Parts, targets: list[Target], units: list[Unit]) -> Callable[[str], torch.Tensor | None]:
    """The weight that a linear (by its name in the files) has been given, as it is served; None before that."""
    keys = {unit.module: unit.key for unit in units}
    owner = {t.module: next(keys[m] for m in parents_of(t.name) if m in keys) for t in targets}
    formats = {target.module: target.format for target in targets}

    def read(module: str) -> torch.Tensor | None:
        if module not in owner or not parts.done(owner[module]):
            return None
        with safe_open(parts.file(owner[module]), "pt") as file:
            names = set(file.keys())
            found = {part: file.get_tensor(name) for part in PARTS if (name := f"{module}.{part}") in names}
        weight = QuantizedWeight.from_tensors(formats[module], found)
        return weight.dequantize(weight.scale.dtype)

    return read


def unit_reader(
    parts: Parts, source: Source, units: list[Unit], read: Callable[[str], torch.Tensor | None]
) -> Callable[[str], dict[str, torch.Tensor]]:
    """The parameters of a unit (by its in-memory name) as they have been written; `read` gives those of linears."""
    keys = {unit.module: unit.key for unit in units}

    def written(name: str) -> dict[str, torch.Tensor]:
        found = {}
        with safe_open(parts.file(keys[name]), "pt") as file:
            kept = set(file.keys())
            for inner, _ in source.model.get_submodule(name).named_parameters():
                place = source.places[f"{name}.{inner}"]
                weight = read(place.module) if inner.endswith("weight") else None
                if weight is not None:
                    found[inner] = weight
                elif place.expert is None and place.tensor in kept:
                    found[inner] = file.get_tensor(place.tensor)
        return found

    return written
