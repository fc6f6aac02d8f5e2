"""Writes codes of the runtime layout as signed bytes u - 2^(bits - 1), row by row, for int8 tensor cores.

Both operands of such an instruction want neighbours along K side by side, not the transpose of `dequantize.py`. A piece
is [rows, K filled up to whole spans]; what is filled up meets zeros.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.kernels.k_loop import load_words
from vlmq_vllm.kernels.layout import STRIPE, Geometry, RuntimeWeight
from vlmq_vllm.kernels.ptx import fields_of, planes_of
from vlmq_vllm.kernels.unpack import codes


@triton.jit(do_not_specialize=["i_first", "n_spans"])
def centre_kernel(
    words,  # [n_stripes, n_spans, P * W, 64] int16
    out,  # [rows of the piece, n_spans * span] int8, the stripes from i_first on
    i_first,
    n_spans,
    BITS: tl.constexpr,
    W: tl.constexpr,
):
    FIELDS: tl.constexpr = fields_of(BITS)
    SPAN: tl.constexpr = FIELDS * W
    i_span = tl.program_id(0) % n_spans
    i_piece = tl.program_id(0) // n_spans
    o_n = tl.arange(0, 64)
    o_w = tl.arange(0, W)
    i_block = (i_first + i_piece).to(tl.int64) * n_spans + i_span
    p_words = words + i_block * (planes_of(BITS) * W * 64) + o_w[None, :] * 64 + o_n[:, None]
    b_words = load_words(p_words, BITS, W)  # [64, W] each
    p_out = out + (i_piece * 64 + o_n).to(tl.int64)[:, None] * (n_spans * SPAN) + (i_span * SPAN + o_w)[None, :]
    for field in tl.static_range(FIELDS):
        b_codes = codes(b_words[0], b_words[1], b_words[2], field, BITS) - (1 << (BITS - 1))
        tl.store(p_out + field * W, b_codes.to(tl.int8))


def centre(weight: RuntimeWeight, out: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Codes less 2^(b-1) into out int8 [rows, filled_columns(geometry)], of the stripes from `start` on."""
    with torch.cuda.device_of(out):
        programs = len(out) // STRIPE * weight.geometry.spans
        centre_kernel[(programs,)](**arguments(weight, out, start))
    return out


def arguments(weight: RuntimeWeight, out: torch.Tensor, start: int) -> dict:
    """What the kernel is called with."""
    geometry = weight.geometry
    given = dict(words=weight.packed, out=out, i_first=start, n_spans=geometry.spans)
    return given | dict(BITS=geometry.bits, W=geometry.slice, num_warps=4)


def filled_columns(geometry: Geometry) -> int:
    """K filled up to whole spans."""
    return geometry.spans * geometry.span
