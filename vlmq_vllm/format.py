"""The weight format of vlmq checkpoints, version 1: the only place that knows where a code's bits lie.

A linear layer with weight W [O, I] is stored as codes u (0 .. 2^bits - 1) with a scale and a zero point per row and
group of `group_size` columns; the last group may be shorter:

    W[o, i] = scale[o, i // group_size] * (u[o, i] - zero[o, i // group_size])

Codes are packed along I into a dense little-endian stream of 32-bit words: code i takes the bits i * bits up to
(i + 1) * bits of the row, without padding between codes, so a 3-bit code may lie across two words. Zero points of
asymmetric weights are packed the same way along O; symmetric ones have zero = 2^(bits - 1) and store none. The bytes
are those of compressed-tensors' `pack-quantized` (0.18 and later). Rounding to codes belongs to `offline/`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

FORMAT_VERSION = 1
BITS = (2, 3, 4, 8)
WORD = 32
FINEST = 32  # groups that a cut makes are no finer: the kernels read scales for so many columns
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class WeightFormat:
    """Bits, grouping and grid of one quantised weight; `group_size` -1 is one group per row.

    Raises ValueError for bits that do not exist and for groups that would begin inside a 32-bit word.
    """

    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        for field, kind in (("bits", int), ("group_size", int), ("symmetric", bool)):
            if type(getattr(self, field)) is not kind:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be of type {kind.__name__}")
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; vlmq has {', '.join(map(str, BITS))}")
        if self.group_size != -1 and (not 0 < self.group_size < 1 << 31 or self.group_size * self.bits % WORD):
            step = WORD // math.gcd(WORD, self.bits)
            raise ValueError(
                f"group_size is {self.group_size}; with {self.bits} bits groups begin on 32-bit words only "
                f"for multiples of {step} (usual: 32, 64, 128), or -1 for one group per row"
            )

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight, 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns that share a scale in a row of `columns`: `group_size`, which may be more, or all of them for -1."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        return -(-columns // self.width(columns))

    def group_of(self, columns: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Group of each column, [columns] int64."""
        return torch.arange(columns, device=device) // self.width(columns)

    def part(self, total: int, columns: int) -> "WeightFormat | None":
        """The format of a part when rows of `total` columns are cut after every `columns`; None when they cannot be.

        A cut falls on a word. Where it goes through a group both sides keep its scale, in groups as fine as the cut.
        """
        if columns == total:
            return self
        if columns * self.bits % WORD:
            return None
        finer = math.gcd(self.group_size, columns)
        if self.group_size in (-1, finer):
            return self
        return WeightFormat(self.bits, finer, self.symmetric) if finer % FINEST == 0 else None

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that stores a weight [rows, columns], by part name."""
        groups = self.groups(columns)
        shapes = {
            "weight_packed": (rows, words(columns, self.bits)),
            "weight_scale": (rows, groups),
            "weight_zero_point": (words(rows, self.bits), groups),
            "weight_shape": (2,),
        }
        if self.symmetric:
            del shapes["weight_zero_point"]
        return shapes

    def bits_per_weight(self, rows: int, columns: int, scale_bits: int = 16) -> float:
        sizes = {part: math.prod(shape) for part, shape in self.shapes(rows, columns).items()}
        words_stored = sizes["weight_packed"] + sizes.get("weight_zero_point", 0)
        return (words_stored * WORD + sizes["weight_scale"] * scale_bits) / (rows * columns)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in codes: `codes` [O, I] uint8, `scale` [O, G] float, `zero` [O, G] uint8 or None when symmetric."""

    format: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """scale * (codes - zero) [O, I], computed in float32 and rounded once to `dtype`."""
        group = self.format.group_of(self.codes.shape[1], self.codes.device)
        offset = self.format.middle if self.zero is None else self.zero.float()[:, group]
        return (self.scale.float()[:, group] * (self.codes.float() - offset)).to(dtype)

    def served(self) -> torch.Tensor:
        """The weight [O, I] float32 with the values that it has once it is dequantised to its scales' dtype."""
        return self.dequantize(self.scale.dtype).float()

    def tensors(self) -> dict[str, torch.Tensor]:
        assert int(self.codes.max()) < self.format.levels, "a code that is too wide would overwrite its neighbours"
        packed = {
            "weight_packed": pack(self.codes, self.format.bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.zero is not None:
            packed["weight_zero_point"] = pack(self.zero.T, self.format.bits).T.contiguous()
        return packed

    @classmethod
    def from_tensors(cls, format: WeightFormat, tensors: Mapping[str, torch.Tensor]) -> "QuantizedWeight":
        """Back from a checkpoint's tensors; shapes must have been checked (`checkpoint.read_modules`)."""
        rows, columns = (int(n) for n in tensors["weight_shape"])
        codes = unpack(tensors["weight_packed"], format.bits, columns)
        zero = None if format.symmetric else unpack(tensors["weight_zero_point"].T, format.bits, rows).T.contiguous()
        return cls(format, codes, tensors["weight_scale"], zero)


def words(codes: int, bits: int) -> int:
    return -(-codes * bits // WORD)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., n] (any integer type, 0 .. 2^bits - 1) into int32 words [..., words(n, bits)]."""
    count = codes.shape[-1]
    blocks = torch.nn.functional.pad(codes.to(torch.int32), (0, -count % WORD)).unflatten(-1, (-1, WORD))
    packed = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        packed[..., word] |= blocks[..., i] << shift
        if shift + bits > WORD:
            packed[..., word + 1] |= blocks[..., i] >> (WORD - shift)
    return packed.flatten(-2)[..., : words(count, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes [..., count] uint8 of int32 words [..., words(count, bits)]."""
    blocks = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty(*blocks.shape[:-1], WORD, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = blocks[..., word] >> shift  # arithmetic: what the sign drags in lies above the mask or is cut below
        if shift + bits > WORD:
            low = (1 << (WORD - shift)) - 1
            code = (code & low) | (blocks[..., word + 1] << (WORD - shift))
        codes[..., i] = (code & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count].contiguous()
