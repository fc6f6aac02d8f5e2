"""Widens weights of 2, 3 and 4 bits to the 4-bit integers that vLLM's CPU kernel takes; no value changes.

A symmetric code c of b bits becomes c + 8 - 2^(b - 1), an asymmetric one stays as it is with its zero point, so every
(code - zero) keeps its value. The weights of a layer, stacked along the rows, become one product: they share the
finest group among them by repeating scales. With N rows and K columns, both filled up to what the kernel takes:

    packed  int32 [N / 16, K * 2]  16 rows a block; in it column by column two words with the codes of 8 rows each
    scales  activation dtype [G, N]
    zeros   int32 [G, N / 8], left out when every weight is symmetric

Filled-up rows have scale 0; filled-up columns meet inputs of 0.
"""

import math
import os

import torch
from torch.nn.functional import pad
from vllm import _custom_ops as ops

from vlmq_vllm.format import QuantizedWeight, WeightFormat, pack
from vlmq_vllm.serving.compat import ORDER

STEP = 32  # the kernel's rows and columns come in multiples of this
MIDDLE = 8
CODES_PER_WORD = 8
BLOCK_ROWS = 16


def why_not_int4(format: WeightFormat, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve weights of this format, or None when it can."""
    if os.environ.get("VLMQ_CPU_DENSE") == "1":
        return "VLMQ_CPU_DENSE=1 is set"
    if not _has_kernel():
        return "this vLLM has no cpu_gemm_wna16 for this processor"
    if format.bits > 4:
        return f"{format.bits}-bit codes do not fit into int4"
    if format.group_size != -1 and format.group_size % BLOCK_ROWS:
        return f"groups of {format.group_size} are no multiple of {BLOCK_ROWS}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel does not know {dtype}"
    return None


def isa(dtype: torch.dtype) -> str:
    """The instruction set to ask the kernel for: vLLM's own choice for its 4-bit weights, "vec" where Linux refuses AMX
    to this process, which it would end for using it unasked."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint

    chosen = _get_isa_hint(dtype)
    return "vec" if chosen == "amx" and not torch.cpu._init_amx() else chosen


def widen(weights: list[QuantizedWeight], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors above for weights [N_i, K], stacked along the rows."""
    columns = weights[0].codes.shape[1]
    group = _common_group([weight.format.width(columns) for weight in weights], columns)
    padded = -(-columns // math.lcm(group, STEP)) * math.lcm(group, STEP)
    first = torch.arange(padded // group).mul(group).clamp(max=columns - 1)  # a column of every group
    symmetric = all(weight.format.symmetric for weight in weights)
    codes, scales, zeros = [], [], []
    for weight in weights:
        belongs = weight.format.group_of(columns)[first]
        shift = MIDDLE - weight.format.middle if symmetric else 0
        codes.append(pad(weight.codes + shift, (0, padded - columns)))
        scales.append(weight.scale[:, belongs].to(dtype))
        # Symmetric weights beside asymmetric ones keep their codes and get their middle.
        zero = torch.full_like(weight.scale, weight.format.middle, dtype=torch.uint8)
        zeros.append((zero if weight.zero is None else weight.zero)[:, belongs])
    rows = sum(len(part) for part in codes)
    below = (0, 0, 0, -rows % STEP)
    tensors = {
        "packed": _pack_blocks(pad(torch.cat(codes), below)),
        "scales": pad(torch.cat(scales), below).T.contiguous(),
    }
    return tensors if symmetric else tensors | {"zeros": pack(pad(torch.cat(zeros), below).T, 4)}


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    isa: str,
) -> torch.Tensor:
    """x [M, I] times a widened weight: [M, rows]."""
    columns, padded_rows = packed.shape[1] // 2, scales.shape[1]
    if x.shape[1] != columns:
        x = pad(x, (0, columns - x.shape[1]))
    if bias is not None and padded_rows != rows:
        bias = pad(bias, (0, padded_rows - rows))
    out = ops.cpu_gemm_wna16(x, packed, scales, zeros, *ORDER, bias, CODES_PER_WORD, isa)
    return out if padded_rows == rows else out[:, :rows]


def _has_kernel() -> bool:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def _common_group(widths: list[int], columns: int) -> int:
    """The finest group; where all have one per row, it is as wide as the row filled up to the kernel's step."""
    grouped = [width for width in widths if width < columns]
    return math.gcd(*grouped) if grouped else -(-columns // STEP) * STEP


def _pack_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] to words [N / 16, K * 2]; the low four bits of a word are the first of its rows."""
    rows, columns = codes.shape
    blocks = codes.view(rows // BLOCK_ROWS, BLOCK_ROWS, columns).transpose(1, 2)
    return pack(blocks.reshape(rows // BLOCK_ROWS, columns * BLOCK_ROWS), 4)
