"""Converts a checkpoint's tensors to the runtime layout, on the device where they lie.

All pieces of a fused layer that have one format become one weight. On a GPU a kernel writes the new words from the old,
a span of 64 rows at a time in registers; the twin in plain torch goes strip by strip. Old and new words of one layer
are in memory together until the caller drops the old; widened codes never are, beyond a strip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from vlmq_vllm.format import QuantizedWeight, WeightFormat, unpack
from vlmq_vllm.kernels import hardware, reference
from vlmq_vllm.kernels.layout import STRIPE, Geometry, RuntimeWeight
from vlmq_vllm.kernels.ptx import fields_of, place_of, plane_of, planes_of

STRIP = 16 * STRIPE  # rows widened at once by the twin
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def code_of(p_row, o_k, n_words, m_code, BITS: tl.constexpr):
    """Codes o_k of rows that begin at p_row, 0 where not m_code; a 3-bit code may lie across two words."""
    o_bit = o_k * BITS
    o_word = o_bit // 32
    b_word = tl.load(p_row + o_word, mask=m_code, other=0).to(tl.uint32, bitcast=True)
    b_code = b_word >> (o_bit % 32).to(tl.uint32)
    if BITS == 3:
        n_above = 32 - o_bit % 32  # bits that are in the first word
        m_next = m_code & (n_above < BITS) & (o_word + 1 < n_words)
        b_next = tl.load(p_row + o_word + 1, mask=m_next, other=0).to(tl.uint32, bitcast=True)
        b_code |= b_next << (n_above % 32).to(tl.uint32)  # what is masked is 0
    return (b_code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def repack_kernel(
    source,  # [N, n_words] int32, a checkpoint's weight_packed
    words,  # [stripes, n_spans, P * W, 64] int16, zero where this piece has no rows
    row_start,  # first row of this piece among the rows of `words`
    N,
    K,
    n_words,
    n_spans,
    BITS: tl.constexpr,
    W: tl.constexpr,
):
    FIELDS: tl.constexpr = fields_of(BITS)
    PLANES: tl.constexpr = planes_of(BITS)
    i_span = tl.program_id(0) % n_spans
    i_stripe = tl.program_id(0) // n_spans + row_start // 64
    o_row = i_stripe * 64 + tl.arange(0, 64)[None, :] - row_start
    o_w = tl.arange(0, W)[:, None]
    m_row = (o_row >= 0) & (o_row < N)
    p_row = source + tl.maximum(o_row, 0).to(tl.int64) * n_words
    p_word = (
        words + (i_stripe.to(tl.int64) * n_spans + i_span) * (PLANES * W * 64) + o_w * 64 + tl.arange(0, 64)[None, :]
    )
    for plane in tl.static_range(PLANES):
        b_word = tl.zeros((W, 64), dtype=tl.int32)
        for field in tl.static_range(FIELDS):
            o_k = i_span * (FIELDS * W) + field * W + o_w
            if plane_of(BITS, field) == plane:
                b_word |= code_of(p_row, o_k, n_words, m_row & (o_k < K), BITS) << place_of(BITS, field)
            elif plane_of(BITS, field) < 0:
                b_code = code_of(p_row, o_k, n_words, m_row & (o_k < K), BITS)
                b_word |= ((b_code >> plane) & 1) << 15
        tl.store(p_word + plane * (W * 64), b_word.to(tl.int16), mask=m_row)


def repack(
    format: WeightFormat, pieces: Sequence[Mapping[str, torch.Tensor]], slice: int | None = None
) -> RuntimeWeight:
    """One weight of `pieces` stacked along the rows; a piece is a checkpoint's tensors by part name.

    All have the same format and number of columns, and lie on one device. `slice` is W where the usual is not wanted.
    Raises ValueError for a format that the kernels cannot read.
    """
    sizes = [tuple(int(n) for n in piece["weight_shape"]) for piece in pieces]
    rows, columns = sum(size[0] for size in sizes), sizes[0][1]
    assert all(size[1] == columns for size in sizes), "pieces of one layer have the same inputs"
    geometry = Geometry.of(format, rows, columns) if slice is None else Geometry(format, rows, columns, slice)
    packed = [piece["weight_packed"] for piece in pieces]
    on_kernel = packed[0].is_cuda or INTERPRETED
    zeros = None
    if not format.symmetric:
        codes = [unpack(p["weight_zero_point"].T, format.bits, n) for p, (n, _) in zip(pieces, sizes, strict=True)]
        zeros = _fill(torch.cat(codes, dim=1), geometry)
    return RuntimeWeight(
        geometry,
        (_by_kernel if on_kernel else _by_torch)(packed, geometry),
        _fill(torch.cat([piece["weight_scale"] for piece in pieces]).T, geometry),
        zeros,
    )


def prepare(weight: QuantizedWeight, slice: int | None = None) -> RuntimeWeight:
    """The runtime layout of a weight, on its device."""
    return repack(weight.format, [weight.tensors()], slice)


def _by_kernel(packed: Sequence[torch.Tensor], geometry: Geometry) -> torch.Tensor:
    words = torch.zeros(geometry.packed_shape, dtype=torch.int16, device=packed[0].device)
    start = 0
    with torch.cuda.device_of(words):
        for source in packed:
            stripes = (start + len(source) - 1) // STRIPE - start // STRIPE + 1
            repack_kernel[(stripes * geometry.spans,)](**arguments(source.contiguous(), words, start, geometry))
            start += len(source)
    return words


def arguments(source: torch.Tensor, words: torch.Tensor, start: int, geometry: Geometry) -> dict:
    return dict(
        source=source,
        words=words,
        row_start=start,
        N=len(source),
        K=geometry.columns,
        n_words=source.shape[1],
        n_spans=geometry.spans,
        BITS=geometry.bits,
        W=geometry.slice,
        **hardware.LAUNCH,
    )


def _by_torch(packed: Sequence[torch.Tensor], geometry: Geometry) -> torch.Tensor:
    stacked = torch.cat(list(packed))
    words = torch.empty(geometry.packed_shape, dtype=torch.int16, device=stacked.device)
    for start in range(0, geometry.rows, STRIP):
        strip = stacked[start : start + STRIP]
        own = replace(geometry, rows=len(strip))
        words[start // STRIPE :][: own.stripes] = reference.to_words(
            unpack(strip, geometry.bits, geometry.columns), own
        )
    return words


def _fill(grouped: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[checkpoint's groups, rows] to [groups, stripes * 64]: repeated where groups are divided, then 0."""
    if geometry.group not in (-1, geometry.format.group_size):
        grouped = grouped.repeat_interleave(geometry.format.group_size // geometry.group, dim=0)[: geometry.groups]
    filled = grouped.new_zeros(geometry.scales_shape)
    filled[: len(grouped), : geometry.rows] = grouped
    return filled
