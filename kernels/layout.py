"""The runtime layout of a quantised weight: what the kernels read, and the one statement of what they can read.

A checkpoint stores codes row by row (`format.py`); here the words of a row lie one below the other, so that
neighbouring rows lie side by side and a kernel's load along N is coalesced. With N rows, K columns and G groups:

    packed  int32 [ceil(K / 32) * bits, N]   32 codes of a row are a block of `bits` words; code k of row n takes the
                                             bits (k % 32) * bits and up of the words from k // 32 * bits on of column
                                             n; the last block is filled up with zeros
    scales  float16, bfloat16 or float32 [G, N], in the checkpoint's dtype
    zeros   uint8 [G, N], or None for a symmetric weight, whose zero point is 2^(bits - 1)

    W[n, k] = scales[k // group_size, n] * (code[n, k] - zeros[k // group_size, n])

A block holds whole codes for every width and never crosses a group, which is why groups are multiples of 32. The layout
is private to `kernels/` and may change between releases: it is made after loading and sharding, never stored.
"""

from dataclasses import dataclass

import torch

from vlmq_vllm.format import WORD, QuantizedWeight, WeightFormat, pack

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(format: WeightFormat, rows: int, columns: int) -> str | None:
    """Why the kernels cannot read a weight [rows, columns] of this format, or None when they can."""
    if not (0 < rows < 1 << 31 and 0 < columns < 1 << 31):
        return f"the weight is {rows} x {columns}; the kernels take 1 to {(1 << 31) - 1} rows and columns"
    if format.group_size != -1 and format.group_size % WORD:
        return (
            f"group_size is {format.group_size}; the kernels take multiples of {WORD}, or -1 for one group per row; "
            f"quantise with --group-size {WORD}, 64 or 128"
        )
    return None


@dataclass(frozen=True, eq=False)
class RuntimeWeight:
    """A weight [rows, columns] in the layout above. Raises ValueError for tensors that do not fit each other."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    columns: int

    def __post_init__(self) -> None:
        reason = why_not(self.format, self.rows, self.columns)
        if reason:
            raise ValueError(reason)
        groups = self.format.groups(self.columns)
        _check("packed", self.packed, (-(-self.columns // WORD) * self.bits, self.rows), (torch.int32,), self.packed)
        _check("scales", self.scales, (groups, self.rows), DTYPES, self.packed)
        if self.zeros is not None:
            _check("zeros", self.zeros, (groups, self.rows), (torch.uint8,), self.packed)

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(self.bits, self.group_size, self.zeros is None)

    @property
    def rows(self) -> int:
        return self.packed.shape[-1]

    def check_input(self, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Raises ValueError unless x [..., columns] and bias [rows] fit this weight."""
        if x.ndim == 0 or x.shape[-1] != self.columns:
            raise ValueError(f"x has shape {list(x.shape)}; its last dimension must be the weight's {self.columns}")
        _check("x", x, tuple(x.shape), DTYPES, self.packed, contiguous=False)
        if bias is not None:
            _check("bias", bias, (self.rows,), DTYPES, self.packed)


def prepare(weight: QuantizedWeight, dtype: torch.dtype) -> RuntimeWeight:
    """The runtime layout of a weight, on its device, for activations of `dtype`.

    `dtype` is only checked: scales multiply float32 sums and keep the precision that the checkpoint gave them.
    """
    if dtype not in DTYPES:
        raise ValueError(f"activations of {dtype} are not supported; the kernels take {_names(DTYPES)}")
    rows, columns = weight.codes.shape
    reason = why_not(weight.format, rows, columns)
    if reason:
        raise ValueError(reason)
    blocks = torch.nn.functional.pad(weight.codes, (0, -columns % WORD))
    return RuntimeWeight(
        packed=pack(blocks, weight.format.bits).T.contiguous(),
        scales=weight.scale.T.contiguous(),
        zeros=None if weight.zero is None else weight.zero.T.contiguous(),
        bits=weight.format.bits,
        group_size=weight.format.group_size,
        columns=columns,
    )


def _check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    beside: torch.Tensor,
    contiguous: bool = True,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; this weight needs {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {_names(dtypes)}")
    if tensor.device != beside.device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {beside.device}; move it there")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
