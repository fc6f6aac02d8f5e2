"""Reads compressed-tensors' `pack-quantized` checkpoints, as llm-compressor writes them.

Names and meaning are ours (`format.py`): codes with an offset of 2^(bits - 1), packed along I, zero points along O.
Since compressed-tensors 0.18 the bytes are, too. Before that a word held whole codes only, ten of 3 bits with two bits
unused; which of the two a module has shows in the width of its weight_packed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlmq_vllm.checkpoint import DTYPES, ModuleInfo, check_surplus, find_parts, read_size
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import BITS, PARTS, WORD, WeightFormat, pack
from vlmq_vllm.headers import TensorInfo, Tensors
from vlmq_vllm.packing import Packing


@dataclass(frozen=True)
class PackQuantizedPacking(Packing):
    """Ours, but for `whole`, the modules of 3 bits whose words hold ten codes."""

    whole: frozenset[str]

    def shapes(self, module: str, format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        shapes = format.shapes(rows, columns)
        if module in self.whole:
            shapes["weight_packed"] = (rows, whole_words(columns, format.bits))
            if not format.symmetric:
                shapes["weight_zero_point"] = (whole_words(rows, format.bits), format.groups(columns))
        return shapes

    def unpack(
        self, module: str, name: str, tensor: torch.Tensor, format: WeightFormat, shape: tuple[int, int]
    ) -> torch.Tensor:
        if module not in self.whole or name in ("weight_scale", "weight_shape"):
            return tensor
        if name == "weight_zero_point":
            return pack(_whole_codes(tensor.T, format.bits)[..., : shape[0]], format.bits).T
        return pack(_whole_codes(tensor, format.bits)[..., : shape[1]], format.bits)


@dataclass(frozen=True)
class PackQuantizedSpec:
    """The formats that the config_groups name."""

    formats: tuple[WeightFormat, ...]

    @classmethod
    def from_dict(cls, config: dict) -> "PackQuantizedSpec":
        """Raises CheckpointError for other formats of compressed-tensors and for what changes inputs or caches."""
        if config.get("kv_cache_scheme") is not None:
            raise CheckpointError("the checkpoint quantises the KV cache (kv_cache_scheme), which vlmq does not serve")
        if config.get("transform_config"):
            raise CheckpointError("the checkpoint transforms activations (transform_config), which vlmq does not serve")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("quantization_config has no config_groups; vlmq reads pack-quantized checkpoints")
        return cls(tuple(dict.fromkeys(_format(name, group, config) for name, group in groups.items())))

    def read(self, folder: Path, headers: dict[str, TensorInfo]) -> tuple[PackQuantizedPacking, dict[str, ModuleInfo]]:
        """Packing and modules by the headers and weight_shapes of `folder`. Raises CheckpointError."""
        tensors = Tensors(folder, headers)
        owners = (name.removesuffix(".weight_packed") for name in headers if name.endswith(".weight_packed"))
        found = {module: self._module(module, headers, tensors) for module in owners}
        check_surplus(found, headers, PARTS)
        whole = frozenset(module for module, (_, is_whole) in found.items() if is_whole)
        return PackQuantizedPacking(whole), {module: info for module, (info, _) in found.items()}

    def _module(self, module: str, headers: dict[str, TensorInfo], tensors: Tensors) -> tuple[ModuleInfo, bool]:
        """Format and sizes, and whether words hold whole codes only."""
        if f"{module}.weight_g_idx" in headers:
            raise CheckpointError(
                f"{module} has weight_g_idx: it was quantised with actorder 'group'; quantise without"
            )
        found = find_parts(module, headers, DTYPES | {"weight_shape": ("I64", "I32")})
        rows, columns = read_size(module, tensors)
        shapes = {part: info.shape for part, info in found.items()}
        fitting: dict[tuple[ModuleInfo, bool], None] = {}
        for said in self.formats:
            format = said if said.group_size < columns else replace(said, group_size=-1)
            for whole in (False, True)[: 1 + (WORD % format.bits != 0)]:
                packing = PackQuantizedPacking(frozenset({module} if whole else ()))
                if packing.shapes(module, format, rows, columns) == shapes:
                    fitting[ModuleInfo(format, rows, columns), whole] = None
        if len(fitting) != 1:
            there = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            formats = "; ".join(
                f"{f.bits} bits, groups of {f.group_size}, {'' if f.symmetric else 'a'}symmetric" for f in self.formats
            )
            problem = "no" if not fitting else "more than one"
            raise CheckpointError(
                f"{module} is {rows} x {columns}, its tensors are {there}; {problem} format of config.json "
                f"fits ({formats})"
            )
        return next(iter(fitting))


def whole_words(codes: int, bits: int) -> int:
    """Words of `codes` codes when a word holds whole ones only."""
    return -(-codes // (WORD // bits))


def _whole_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """All codes [..., n * (32 // bits)] of words [..., n] that hold whole codes only; the last ones may be filling."""
    shifts = torch.arange(WORD // bits, device=packed.device) * bits
    return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)


def _format(name: str, group: Any, config: dict) -> WeightFormat:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"config_groups.{name} says nothing about weights; vlmq reads pack-quantized checkpoints")
    packed = group.get("format") or config.get("format")
    if packed != "pack-quantized" or weights.get("type", "int") != "int":
        raise CheckpointError(f"config_groups.{name} is {packed!r} of type {weights.get('type')!r}; vlmq reads "
                              "pack-quantized integers")  # fmt: skip
    if group.get("input_activations") is not None or group.get("output_activations") is not None:
        raise CheckpointError(f"config_groups.{name} quantises activations; vlmq serves 16-bit activations only")
    if weights.get("actorder") == "group":
        raise CheckpointError(
            f"config_groups.{name} was made with actorder 'group'; quantise with actorder 'static' (weight) or none"
        )
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits not in BITS or strategy not in ("group", "channel"):
        raise CheckpointError(
            f"config_groups.{name} has {bits} bits by {strategy}; vlmq reads {', '.join(map(str, BITS))} bits by group "
            "or channel"
        )
    group_size: Any = weights.get("group_size") if strategy == "group" else -1
    try:
        return WeightFormat(bits, group_size, bool(weights.get("symmetric", True)))
    except ValueError as error:
        raise CheckpointError(f"config_groups.{name}: {error}") from None
