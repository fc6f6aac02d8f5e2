"""Reads checkpoints in GPTQ's format, as GPTQModel and its forerunners write them, and AutoRound by `auto_gptq`.

A linear layer [O, I] is stored along I first, every tensor turned over against ours:

    qweight int32 [I * bits / 32, O]   the dense little-endian stream of codes down each column
    scales  float [G, O]
    qzeros  int32 [G, O * bits / 32]   the same stream along O; version 1 stores every zero point less one
    g_idx   int32 [I]                  group of each column; only the plain order can be served

Version 2 (`checkpoint_format: gptq_v2`) stores zero points as they are. GPTQModel makes version 1 by taking one from
each code of a word at once, so that a zero point of 0 borrows from its neighbour; with 3 bits every code wraps alone. A
weight is symmetric if all its zero points are the middle, whatever config.json says.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_vllm.checkpoint import SCALE_DTYPES, ModuleInfo, check_shapes, check_surplus, find_parts
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import BITS, WORD, WeightFormat, pack, unpack, words
from vlmq_vllm.headers import TensorInfo, Tensors
from vlmq_vllm.packing import Packing

PARTS = {"qweight": "weight_packed", "scales": "weight_scale", "qzeros": "weight_zero_point"}
DTYPES = {"qweight": ("I32",), "scales": SCALE_DTYPES, "qzeros": ("I32",)}
FORMATS = {"gptq": 1, "gptq_v2": 2}
AUTO_ROUND = {"auto_round:auto_gptq": 1, "auto_gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}


@dataclass(frozen=True)
class GPTQPacking(Packing):
    """GPTQ's packing; `version` of the zero points, 1 or 2."""

    version: int

    @property
    def parts(self) -> dict[str, str]:
        return PARTS

    def shapes(self, module: str, format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        groups = format.groups(columns)
        return {
            "qweight": (words(columns, format.bits), rows),
            "scales": (groups, rows),
            "qzeros": (groups, words(rows, format.bits)),
        }

    def unpack(
        self, module: str, name: str, tensor: torch.Tensor, format: WeightFormat, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        if name != "qzeros":
            return tensor.T
        return None if format.symmetric else self.zeros(tensor, format.bits, shape[0])

    def zeros(self, stored: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
        """Zero points [words(rows), G] as `format.py` packs them, from those of a file [G, words(rows)]."""
        if self.version == 2:
            return stored.T
        if WORD % bits == 0:  # ones are added to whole words, as they were taken from them: a 0 borrowed from the next
            return (stored + sum(1 << shift for shift in range(0, WORD, bits))).T
        return pack((unpack(stored, bits, rows) + 1) % (1 << bits), bits).T


@dataclass(frozen=True)
class GPTQSpec:
    """What a quantization_config says of all modules: its bits, group sizes, and the version of the zero points."""

    bits: int
    group_sizes: tuple[int, ...]
    symmetric: bool
    version: int
    act_order: bool = False

    @classmethod
    def from_dict(cls, config: dict) -> "GPTQSpec":
        """Raises CheckpointError for packings of other methods and for what has no bits or group size."""
        method = config.get("quant_method")
        if method == "gptq":
            name, known = config.get("checkpoint_format", "gptq"), FORMATS
        else:
            name, known = config.get("packing_format", "auto_round:auto_gptq"), AUTO_ROUND
        if type(name) is not str or name not in known:
            raise CheckpointError(
                f"the checkpoint is packed as {name!r}; of {method}'s packings vlmq reads {', '.join(known)}"
            )
        for key, fits in (("bits", lambda n: n in BITS), ("group_size", lambda n: n == -1 or n > 0)):
            if type(config.get(key)) is not int or not fits(config[key]):
                raise CheckpointError(
                    f"quantization_config has {key} {config.get(key)!r}; vlmq reads {', '.join(map(str, BITS))} bits "
                    "and group sizes that are positive or -1"
                )
        overrides = [*_entries(config, "dynamic"), *_entries(config, "extra_config")]
        said = [entry.get("group_size") for entry in (config, *overrides)]
        sizes = tuple(dict.fromkeys(size for size in said if type(size) is int))
        return cls(config["bits"], sizes, bool(config.get("sym", False)), known[name], bool(config.get("desc_act")))

    def read(self, folder: Path, headers: dict[str, TensorInfo]) -> tuple[GPTQPacking, dict[str, ModuleInfo]]:
        """Packing and modules by the headers, zero points and g_idx of `folder`. Raises CheckpointError."""
        tensors = Tensors(folder, headers)
        owners = (name.removesuffix(".qweight") for name in headers if name.endswith(".qweight"))
        modules = {module: self._module(module, headers, tensors) for module in owners}
        check_surplus(modules, headers, (*PARTS, "g_idx"))
        return GPTQPacking(self.version), modules

    def _module(self, module: str, headers: dict[str, TensorInfo], tensors: Tensors) -> ModuleInfo:
        found = find_parts(module, headers, DTYPES)
        for part, info in found.items():
            if len(info.shape) != 2 or 0 in info.shape:
                raise CheckpointError(f"{module}.{part} is {list(info.shape)}; GPTQ has matrices")
        height, rows = found["qweight"].shape
        bits = self._bits(module, rows, found["qzeros"].shape[1])
        columns, rest = divmod(height * WORD, bits)
        if rest:
            raise CheckpointError(f"{module}.qweight has {height} rows, no whole number of {bits}-bit codes")
        group_size = self._group_size(module, columns, found["scales"].shape[0])
        try:
            format = WeightFormat(bits, group_size, self._is_symmetric(module, tensors, bits, rows))
        except ValueError as error:
            raise CheckpointError(f"{module}: {error}") from None
        shapes = GPTQPacking(self.version).shapes(module, format, rows, columns)
        check_shapes(module, found, format, (rows, columns), shapes)
        if self.act_order or f"{module}.g_idx" in headers:
            _check_order(module, headers, tensors, columns, format)
        return ModuleInfo(format, rows, columns)

    def _bits(self, module: str, rows: int, width: int) -> int:
        """The width by which `rows` zero points fill `width` words; config.json's where several would."""
        fitting = [bits for bits in BITS if words(rows, bits) == width]
        if not fitting:
            raise CheckpointError(
                f"{module}.qzeros has {width} words for {rows} rows; that is none of {', '.join(map(str, BITS))} bits"
            )
        return self.bits if self.bits in fitting else fitting[0]

    def _group_size(self, module: str, columns: int, groups: int) -> int:
        if groups == 1:
            return -1
        fitting = [size for size in self.group_sizes if size > 0 and -(-columns // size) == groups]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{module} has {groups} groups for {columns} columns; of config.json's groups of "
                f"{', '.join(map(str, self.group_sizes))} {'none fits' if not fitting else 'several fit'}"
            )
        return fitting[0]

    def _is_symmetric(self, module: str, tensors: Tensors, bits: int, rows: int) -> bool:
        """Whether all zero points are the middle. Raises CheckpointError where the file says it is symmetric, and its
        zero points are all the one that the other version would store."""
        stored = tensors.get(f"{module}.qzeros")
        middle = 1 << (bits - 1)
        plain = pack(torch.full((rows,), middle, dtype=torch.uint8), bits)
        less_one = pack(torch.full((rows,), middle - 1, dtype=torch.uint8), bits)
        own, other = (less_one, plain) if self.version == 1 else (plain, less_one)
        if self.symmetric and torch.equal(stored, other.expand_as(stored)):
            raise CheckpointError(
                f"{module}.qzeros are stored as version {3 - self.version} does it, but config.json says version "
                f"{self.version}; correct checkpoint_format (gptq is version 1, gptq_v2 version 2)"
            )
        return torch.equal(stored, own.expand_as(stored))


def _entries(config: dict, key: str) -> list[dict]:
    """The settings of single modules or patterns; other things than dictionaries mean nothing here."""
    found = config.get(key)
    return [entry for entry in found.values() if isinstance(entry, dict)] if isinstance(found, dict) else []


def _check_order(
    module: str, headers: dict[str, TensorInfo], tensors: Tensors, columns: int, format: WeightFormat
) -> None:
    name = f"{module}.g_idx"
    shape = headers[name].shape if name in headers else None
    if shape != (columns,) or not torch.equal(tensors.get(name).long(), format.group_of(columns)):
        raise CheckpointError(
            f"{name} is not the plain order of columns: the model was quantised with act-order (desc_act); "
            "quantise it without, or with groups that keep the order (static groups)"
        )
