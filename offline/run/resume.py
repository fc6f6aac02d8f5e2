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
from vlmq_vllm.offline.model.targets import Target, Unit, key_of
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


def reader(
    parts: Parts, source: Source, targets: list[Target], units: list[Unit]
) -> Callable[[str], torch.Tensor | None]:
    """A parameter (by its in-memory name) as it has been written, a linear's weight as it is served; None before."""
    keys = {unit.module: unit.key for unit in units}
    formats = {target.module: target.format for target in targets}

    def read(name: str) -> torch.Tensor | None:
        key = key_of(name, keys)
        if key is None or not parts.done(key):
            return None
        place = source.places[name]
        with safe_open(parts.file(key), "pt") as file:
            there = set(file.keys())
            found = {part: file.get_tensor(n) for part in PARTS if (n := f"{place.module}.{part}") in there}
            if not found:
                return file.get_tensor(place.tensor) if place.expert is None and place.tensor in there else None
        weight = QuantizedWeight.from_tensors(formats[place.module], found)
        return weight.dequantize(weight.scale.dtype)

    return read
