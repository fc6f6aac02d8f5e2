"""Tells what a checkpoint holds, from its headers, its config and the report of the run; reads no weights."""

import json
import math
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmq_vllm.checkpoint import ModuleInfo, read_modules, read_spec
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import PARTS, WeightFormat
from vlmq_vllm.headers import TensorInfo, read_config, read_headers
from vlmq_vllm.offline.checkpoint.writer import REPORT

COMPONENTS = {"connector": r"merger|projector|connector", "vision": r"visual\.|vision", "lm_head": r"lm_head"}


@dataclass
class Kind:
    """Quantised linears of one name pattern and format; `parameters` of all of them, `bits` stored per weight."""

    component: str
    pattern: str
    format: WeightFormat
    count: int = 0
    parameters: int = 0
    bits: float = 0.0


@dataclass(frozen=True)
class Info:
    """`bytes` of all weight files. `activation_bits`: of the inputs of quantised linears. `tool`: who made it, {} where
    config.json does not say. `samples`: of the calibration, None where there is no report of the run."""

    folder: Path
    model_type: str | None
    kinds: list[Kind]
    bytes: int
    parameters: int
    quantized: int
    bits_per_weight: float
    bits_per_parameter: float
    activation_bits: int
    tool: dict
    samples: int | None
    serve: str

    def to_dict(self) -> dict:
        formats = [asdict(kind) for kind in self.kinds]
        for entry in formats:
            entry |= entry.pop("format") | {"bits_per_weight": entry["bits"]}
        plain = {name: value for name, value in vars(self).items() if name not in ("folder", "kinds")}
        return {"folder": str(self.folder), "formats": formats} | plain


def info(folder: Path) -> Info:
    """Read what the checkpoint says of itself. Raises CheckpointError when it is none, or contradicts itself."""
    modules, headers, config = read_modules(folder), read_headers(folder), read_config(folder)
    if not modules:
        raise CheckpointError(f"{folder} calls itself vlmq, but no tensor is quantised; quantise it anew")
    quantized = sum(module.rows * module.columns for module in modules.values())
    packed = sum(_stored_bits(name, headers) for name in modules)
    kept = {name: tensor for name, tensor in headers.items() if name.rpartition(".")[2] not in PARTS}
    parameters = quantized + sum(math.prod(tensor.shape) for tensor in kept.values())
    total = packed + sum(8 * tensor.nbytes for tensor in kept.values())
    return Info(
        folder=folder,
        model_type=config.get("model_type"),
        kinds=_kinds(modules, headers),
        bytes=sum((folder / name).stat().st_size for name in {tensor.file for tensor in headers.values()}),
        parameters=parameters,
        quantized=quantized,
        bits_per_weight=packed / quantized,
        bits_per_parameter=total / parameters,
        activation_bits=read_spec(folder).activation_bits,
        tool=config["quantization_config"].get("tool") or {},
        samples=_samples(folder / REPORT),
        serve=f"vllm serve {shlex.quote(str(folder))} --quantization vlmq",
    )


def component_of(module: str) -> str:
    return next((name for name, pattern in COMPONENTS.items() if re.search(pattern, module)), "language")


def _kinds(modules: dict[str, ModuleInfo], headers: dict[str, TensorInfo]) -> list[Kind]:
    found: dict[tuple, Kind] = {}
    for name, module in modules.items():
        pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
        key = (component_of(name), pattern, module.format)
        kind = found.setdefault(key, Kind(*key))
        kind.count += 1
        kind.parameters += module.rows * module.columns
        kind.bits += _stored_bits(name, headers)
    for kind in found.values():
        kind.bits /= kind.parameters
    return sorted(found.values(), key=lambda kind: (kind.component, kind.pattern, kind.format.bits))


def _stored_bits(module: str, headers: dict[str, TensorInfo]) -> int:
    parts = (headers.get(f"{module}.{part}") for part in PARTS if part != "weight_shape")
    return sum(8 * tensor.nbytes for tensor in parts if tensor)


def _samples(path: Path) -> int | None:
    """How many samples the run was calibrated on. Raises CheckpointError for a report that cannot be read."""
    if not path.is_file():
        return None
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["calibration"]["fingerprints"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not the report of a vlmq run; copy the checkpoint again") from None
