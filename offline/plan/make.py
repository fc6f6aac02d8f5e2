"""Makes the plan of a run: all that can be said of it before it begins, from headers and config alone."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.model.source import Source, find
from vlmq_vllm.offline.model.targets import expected_bytes, find_kept, find_rest, find_targets, find_units, stored_bytes
from vlmq_vllm.offline.plan.components import Component, find_components
from vlmq_vllm.offline.plan.memory import LIBRARIES, Memory, Phase, is_forecast
from vlmq_vllm.offline.plan.sizes import Load, load_of
from vlmq_vllm.offline.plan.tensor_parallel import LinearKind, find_linear_kinds
from vlmq_vllm.offline.plan.warnings import find_warnings
from vlmq_vllm.offline.settings.quantize import Settings


@dataclass(frozen=True)
class Plan:
    """What a run would do. Sizes in bytes; `device` is "cpu" or "cuda"."""

    folder: Path
    model_type: str
    settings: Settings
    device: str
    load: Load
    parts: list[Component]
    linears: list[LinearKind]
    phases: list[Phase]
    source_bytes: int
    checkpoint_bytes: int
    warnings: list[str]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def quantized(self) -> int:
        """Weights that become quantised."""
        return sum(part.quantized for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantised weights, with scales and zero points."""
        return sum(part.packed_bits for part in self.parts) / self.quantized

    @property
    def peak(self) -> Phase:
        """The phase that needs most on the device."""
        return max(self.phases, key=lambda phase: self.host_bytes(phase) + sum(phase.device.values()))

    def host_bytes(self, phase: Phase) -> int:
        """Host memory of a phase; on a CPU the device's is the host's."""
        own = sum(phase.host.values()) + (sum(phase.device.values()) if self.device == "cpu" else 0)
        return LIBRARIES + own

    @property
    def peak_is_bound(self) -> bool:
        """Whether peaks are upper bounds; else they are forecast within 20 %."""
        return not is_forecast(self.settings)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak of the host's memory."""
        return max(map(self.host_bytes, self.phases))

    @property
    def peak_device_bytes(self) -> int | None:
        """Peak of what torch allocates on a GPU; None on a CPU."""
        return None if self.device == "cpu" else max(sum(phase.device.values()) for phase in self.phases)

    def to_dict(self) -> dict:
        """The plan as JSON; its keys stay as they are."""
        return {
            "model": str(self.folder),
            "model_type": self.model_type,
            "device": self.device,
            "settings": self.settings.to_dict(),
            "parameters": self.parameters,
            "quantized_parameters": self.quantized,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": 8 * self.checkpoint_bytes / self.parameters,
            "source_bytes": self.source_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "peak_is_bound": self.peak_is_bound,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "library_bytes": LIBRARIES,
            "tokens": self.load.total,
            "parts": [asdict(part) | {"bits": part.bits} for part in self.parts],
            "phases": [asdict(phase) | {"host_bytes": self.host_bytes(phase)} for phase in self.phases],
            "linears": [_linear(linear) for linear in self.linears],
            "warnings": self.warnings,
        }


def make_plan(model: str, settings: Settings, device: str = "cpu", tokens: int | None = None) -> Plan:
    """The plan for `model` (a folder or hub name). `tokens`: of a sample, where that is known; else max_tokens.

    Raises RefusedError for a model that cannot be quantised and for layers that vLLM would not load, QuantizeError for
    a wrong option, CheckpointError for a damaged model.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise QuantizeError(f"device is {device!r}; choose cpu or cuda")
    if tokens is not None and not 1 <= tokens <= settings.max_tokens:
        raise QuantizeError(f"tokens is {tokens}; samples have 1 to {settings.max_tokens} (--max-tokens)")
    folder = find(model)
    source = Source(folder)
    if settings.rotate:
        source.rotate(settings.seed, torch.device("cpu"))
    units = find_units(source, settings)
    targets = find_targets(source, settings, units)
    rest = find_rest(source, targets, find_kept(source, targets, units))
    load = load_of(source, settings, tokens)
    parts, linears = find_components(source, targets), find_linear_kinds(source, targets)
    return Plan(
        folder=folder,
        model_type=source.config["model_type"],
        settings=settings,
        device=kind,
        load=load,
        parts=parts,
        linears=linears,
        phases=Memory(source, settings, load, exact=kind == "cpu").phases(units, rest),
        source_bytes=sum(part.bytes for part in parts) - sum(stored_bytes(source, name) for name in source.tied),
        checkpoint_bytes=expected_bytes(source, targets),
        warnings=find_warnings(source, settings, load, linears),
    )


def _linear(linear: LinearKind) -> dict:
    groups = linear.format.groups(linear.columns)
    width = linear.format.width(linear.columns)
    return {
        "pattern": linear.pattern,
        "component": linear.component,
        "count": linear.count,
        "rows": linear.rows,
        "columns": linear.columns,
        **asdict(linear.format),
        "groups": groups,
        "last_group": linear.columns - (groups - 1) * width,
        "vllm_layer": linear.layer,
        "unserved": linear.refused,
        "tensor_parallel": {
            str(size): {"fits": reason is None, "reason": reason, "group_sizes": linear.fitting.get(size, [])}
            for size, reason in linear.cuts.items()
        },
    }
