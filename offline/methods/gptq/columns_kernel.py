"""The inner block of the column solver (`columns.py`) in Triton: some columns of [B, I, O], rounded one by one.

In plain torch a column takes a dozen launches, and starting them is what a GPU would wait for; here a block of columns
takes one. Rows (O) never meet, so each program owns a tile of them in one of the B problems and walks over the columns.
A column fetches what the block's columns before it leave to it when its turn comes, instead of each handing it on to
all later ones: the tiles of deltas and values stay in registers, and memory is read and written once.

Divisions and halves are rounded as torch does, sums of products in another order.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.offline.methods.gptq.columns import ColumnPass

INTERPRETED = triton.knobs.runtime.interpret
WARPS = 1
TILE = 32 * WARPS  # one row per thread: its sums over columns need no other thread


@triton.jit(do_not_specialize=["start", "count"])
def columns_kernel(
    remainder,  # [B, n_columns, n_rows], on entry the targets, then the deltas
    owed,  # [B, n_columns, n_rows]
    values,  # [B, n_columns, n_rows], written if HAS_PUSH
    codes,  # [B, n_columns, n_rows] uint8
    loss,  # [B, n_rows]
    factor,  # [B, n_columns, n_columns], any strides; read on and above the diagonal
    push,  # [B, n_columns, n_columns], any strides; read above the diagonal if HAS_PUSH
    scale,  # [B, n_groups, n_rows]
    zero,  # [B, n_groups, n_rows]
    group_of,  # [B, n_columns] int64
    top,  # the largest code, float
    start,
    count,  # columns start .. start + count
    n_columns,
    n_rows,
    n_groups,
    stride_factor_b,
    stride_factor_i,
    stride_factor_k,
    stride_push_b,
    stride_push_i,
    stride_push_k,
    HAS_PUSH: tl.constexpr,
    BLOCK: tl.constexpr,  # at least `count`
    TILE: tl.constexpr,
):
    # 1.5 * 2^23: so large that the sum keeps no fraction, and float32 addition rounds halves to even.
    ROUND: tl.constexpr = 12582912.0
    i_tile = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(n_rows, TILE)
    i_b = i_tile // n_tiles
    o_n = (i_tile % n_tiles) * TILE + tl.arange(0, TILE)
    m_n = o_n < n_rows
    o_j = tl.arange(0, BLOCK)
    i_first = tl.cast(start, tl.int64)
    p_factor = factor + i_b * stride_factor_b + (i_first + o_j) * stride_factor_i  # [BLOCK], column 0
    p_push = push
    if HAS_PUSH:
        p_push += i_b * stride_push_b + (i_first + o_j) * stride_push_i
    b_deltas = tl.zeros((BLOCK, TILE), dtype=tl.float32)  # of the columns done, 0 for the others
    b_values = b_deltas
    b_loss = tl.load(loss + i_b * n_rows + o_n, mask=m_n, other=0.0)

    for k in range(0, count):
        i_k = i_first + k
        m_done = o_j < k
        m_now = (o_j == k)[:, None]
        o_column = (i_b * n_columns + i_k) * n_rows + o_n
        o_grid = (i_b * n_groups + tl.load(group_of + i_b * n_columns + i_k).to(tl.int64)) * n_rows + o_n
        b_scale = tl.load(scale + o_grid, mask=m_n, other=1.0)
        b_zero = tl.load(zero + o_grid, mask=m_n, other=0.0)
        b_target = tl.load(remainder + o_column, mask=m_n, other=0.0)
        b_owed = tl.load(owed + o_column, mask=m_n, other=0.0)
        b_pivot = tl.load(factor + i_b * stride_factor_b + i_k * (stride_factor_i + stride_factor_k))
        b_factor = tl.load(p_factor + i_k * stride_factor_k, mask=m_done, other=0.0)
        b_owed += tl.sum(b_deltas * b_factor[:, None], 0)
        if HAS_PUSH:
            b_push = tl.load(p_push + i_k * stride_push_k, mask=m_done, other=0.0)
            b_target += tl.sum(b_values * b_push[:, None], 0)

        b_value = b_target + tl.div_rn(b_owed, b_pivot)
        b_code = tl.div_rn(b_value, b_scale) + b_zero
        b_code = tl.minimum(tl.maximum(b_code, 0.0), top) + ROUND - ROUND
        b_rounded = (b_code - b_zero) * b_scale
        b_delta = b_target - b_rounded
        b_lost = (b_value - b_rounded) * b_pivot
        b_loss += b_lost * b_lost

        b_deltas = tl.where(m_now, b_delta[None, :], b_deltas)
        tl.store(remainder + o_column, b_delta, mask=m_n)
        tl.store(owed + o_column, b_owed, mask=m_n)
        tl.store(codes + o_column, b_code.to(tl.uint8), mask=m_n)
        if HAS_PUSH:
            b_values = tl.where(m_now, b_value[None, :], b_values)
            tl.store(values + o_column, b_value, mask=m_n)

    tl.store(loss + i_b * n_rows + o_n, b_loss, mask=m_n)


def round_columns(state: ColumnPass, columns: range, block: int) -> None:
    """Round `columns`, at most `block`, of a pass; in place.

    All but codes (uint8) and group_of (int64) is float32; factor and push may have any strides, the rest is contiguous.
    """
    remainder, factor, push = state.remainder, state.factor, state.push
    if not (remainder.is_cuda or INTERPRETED):
        raise ValueError(
            f"targets are on {remainder.device}; Triton needs a GPU, or TRITON_INTERPRET=1 before the first import"
        )
    if (state.values is None) != (push is None):
        raise ValueError("values and push come together or not at all")
    for name in ("remainder", "owed", "values", "codes", "loss", "scale", "zero", "group_of"):
        tensor = getattr(state, name)
        dtype = {"codes": torch.uint8, "group_of": torch.int64}.get(name, torch.float32)
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            told = "targets" if name == "remainder" else name
            raise ValueError(f"{told}: {tensor.dtype} with strides {tensor.stride()}; it must be contiguous {dtype}")
    for name, matrix in (("factor", factor), ("push", push)):
        if matrix is not None and matrix.dtype != torch.float32:
            raise ValueError(f"{name}: {matrix.dtype}; it must be torch.float32")
    if len(columns) > block:
        raise ValueError(f"{len(columns)} columns at once; the kernel's block is {block}")
    problems, n_columns, n_rows = remainder.shape
    with torch.cuda.device_of(remainder):  # Triton launches on the current device, which need not be the tensors'
        columns_kernel[(problems * triton.cdiv(n_rows, TILE),)](
            remainder=remainder,
            owed=state.owed,
            values=state.values,
            codes=state.codes,
            loss=state.loss,
            factor=factor,
            push=push,
            scale=state.scale,
            zero=state.zero,
            group_of=state.group_of,
            top=float(state.levels - 1),
            start=columns.start,
            count=len(columns),
            n_columns=n_columns,
            n_rows=n_rows,
            n_groups=state.scale.shape[1],
            stride_factor_b=factor.stride(0),
            stride_factor_i=factor.stride(1),
            stride_factor_k=factor.stride(2),
            stride_push_b=0 if push is None else push.stride(0),
            stride_push_i=0 if push is None else push.stride(1),
            stride_push_k=0 if push is None else push.stride(2),
            HAS_PUSH=push is not None,
            BLOCK=block,
            TILE=TILE,
            num_warps=WARPS,
            enable_fp_fusion=True,  # not the default from Triton 3.10 on
        )
