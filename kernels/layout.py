"""The runtime layout of a quantised weight: what the kernels read, and the one statement of what they can read.

64 rows lie side by side in 16-bit words, and a word holds codes that lie W columns apart, so that unpacking a block of
words gives slices of W neighbouring columns without moving anything between threads. For N rows and K columns at
`bits`, with F codes and P words a field set (`FIELDS`, `PLANES`):

    span    F * W columns; K is filled up to whole spans, N to whole stripes of 64 rows, with zeros
    packed  int16 [stripes, spans, P * W, 64]; code F' of word w of span s belongs to column s * span + F' * W + w
            2, 4 and 8 bits: code j takes the bits j * bits and up of the word
            3 bits: 16 codes in three words, code j < 15 at bit 3 * (j % 5) of word j // 5, code 15 in the top bits of
            the three (lowest in word 0), so that a weight takes exactly 3 bits
    scales  float16, bfloat16 or float32 [groups, stripes * 64], in the checkpoint's dtype; 0 where filled up
    zeros   uint8, the same shape, or None for a symmetric weight, whose zero point is 2^(bits - 1)

    W[n, k] = scales[k // group, n] * (code[n, k] - zeros[k // group, n])

Groups are those of the checkpoint where these fit into a span or are made of whole ones; else scales are repeated for
the largest group that does (`Geometry.group`). The layout is made after loading and sharding (`repack.py`), never
stored, and may change between releases.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from vlmq_vllm.format import WORD, WeightFormat

ACTIVATIONS = (torch.float16, torch.bfloat16)
FLOATS = (*ACTIVATIONS, torch.float32)
STRIPE = 64
MOST = 1 << 24  # rows and columns: a stripe's words and a row of tokens are counted in 32 bits
MOST_WEIGHTS = 1 << 35  # so are the scales, one for at least 32 weights
FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
PLANES = {2: 1, 3: 3, 4: 1, 8: 1}
SLICES = {2: (32, 16, 64), 3: (32, 16), 4: (64, 32), 8: (64, 32)}  # widths W the kernels take, the usual one first


def why_not(format: WeightFormat, rows: int, columns: int) -> str | None:
    """Why the kernels cannot read a weight [rows, columns] of this format, or None when they can."""
    if not (0 < rows <= MOST and 0 < columns <= MOST):
        return f"the weight is {rows} x {columns}; the kernels take 1 to {MOST} rows and columns"
    if rows * columns > MOST_WEIGHTS:
        return f"the weight is {rows} x {columns}; the kernels take {MOST_WEIGHTS} weights at most"
    if format.group_size != -1 and format.group_size % WORD:
        return (
            f"group_size is {format.group_size}; the kernels take multiples of {WORD}, or -1 for one group per row; "
            f"quantise with --group-size {WORD}, 64 or 128"
        )
    return None


@dataclass(frozen=True)
class Geometry:
    """Sizes of a weight in the layout above; `slice` is W. Raises ValueError for what the kernels cannot read."""

    format: WeightFormat
    rows: int
    columns: int
    slice: int

    def __post_init__(self) -> None:
        reason = why_not(self.format, self.rows, self.columns)
        if reason:
            raise ValueError(reason)
        if self.slice not in _slices(self.format):
            allowed = " or ".join(map(str, _slices(self.format)))
            raise ValueError(
                f"slice is {self.slice}; at {self.format.bits} bits with group_size {self.format.group_size} "
                f"it must be {allowed}"
            )

    @classmethod
    def of(cls, format: WeightFormat, rows: int, columns: int) -> "Geometry":
        """The usual slice, or a narrower one where that saves more than a 32nd of the bytes by filling up less."""
        filled = {w: -(-columns // (FIELDS[format.bits] * w)) * w for w in _slices(format)}
        fitting = [w for w in filled if filled[w] * 32 <= min(filled.values()) * 33]
        return cls(format, rows, columns, fitting[0] if fitting else 0)

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def span(self) -> int:
        return FIELDS[self.bits] * self.slice

    @property
    def spans(self) -> int:
        return -(-self.columns // self.span)

    @property
    def stripes(self) -> int:
        return -(-self.rows // STRIPE)

    @cached_property
    def group(self) -> int:
        """Columns that share a scale: -1 (all), a divisor of the span or a multiple of it."""
        size = self.format.group_size
        return size if size == -1 or size % self.span == 0 else math.gcd(size, self.span)

    @property
    def groups(self) -> int:
        """Rows of `scales`."""
        if self.group == -1:
            return 1
        return self.spans * self.span // self.group if self.group < self.span else -(-self.columns // self.group)

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        return (self.stripes, self.spans, PLANES[self.bits] * self.slice, STRIPE)

    @property
    def scales_shape(self) -> tuple[int, int]:
        return (self.groups, self.stripes * STRIPE)


def _slices(format: WeightFormat) -> tuple[int, ...]:
    """Slice widths whose fields do not cross a group."""
    return tuple(w for w in SLICES[format.bits] if format.group_size == -1 or format.group_size % w == 0)


@dataclass(frozen=True, eq=False)
class RuntimeWeight:
    """A weight in the layout above. Raises ValueError for tensors that do not fit each other."""

    geometry: Geometry
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __post_init__(self) -> None:
        check_tensor("packed", self.packed, self.geometry.packed_shape, (torch.int16,), self.packed)
        check_tensor("scales", self.scales, self.geometry.scales_shape, FLOATS, self.packed)
        if (self.zeros is None) != self.geometry.format.symmetric:
            raise ValueError("a symmetric weight has no zeros, an asymmetric one needs them")
        if self.zeros is not None:
            check_tensor("zeros", self.zeros, self.geometry.scales_shape, (torch.uint8,), self.packed)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.packed, self.scales, self.zeros) if tensor is not None)

    def check_input(self, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Raises ValueError unless x [..., columns] and bias [rows], of one dtype, fit this weight."""
        if x.ndim == 0 or x.shape[-1] != self.geometry.columns:
            raise ValueError(
                f"x has shape {list(x.shape)}; its last dimension must be the weight's {self.geometry.columns}"
            )
        check_tensor("x", x, tuple(x.shape), ACTIVATIONS, self.packed, contiguous=False)
        if bias is not None:
            check_tensor("bias", bias, (self.geometry.rows,), (x.dtype,), self.packed)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    beside: torch.Tensor,
    contiguous: bool = True,
) -> None:
    """Raises ValueError naming the tensor unless it has this shape, one of the types, and lies where `beside` does."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; this weight needs {list(shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}; it must be {names}")
    if tensor.device != beside.device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {beside.device}; move it there")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16 as all of torch's own memory: kernels are
    compiled for that, and would be anew for another."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
