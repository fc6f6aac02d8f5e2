"""The fused kernel: multiplies tokens with a packed weight, x W^T + bias, in one launch.

A program computes a tile of `k_loop.py`, over all of K or over one of `splits` parts, which meet in `split_k.py`. Runs
on a CPU in Triton's interpreter when TRITON_INTERPRET=1 was set before this module's import.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.kernels import hardware, tiles, workspace
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.k_loop import accumulate
from vlmq_vllm.kernels.layout import FLOATS, RuntimeWeight, check_tensor
from vlmq_vllm.kernels.split_k import meet

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def write(b_acc, token_scales, p_bias, p_out, o_n, o_m, N, M, stride_out, HAS_BIAS: tl.constexpr):
    """The tile [BN, BM], times the tokens' scales if there are any, plus bias, into out [M, N]."""
    m_n = o_n < N
    if token_scales is not None:
        b_acc *= tl.load(token_scales + o_m, mask=o_m < M, other=0.0)[None, :]
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_tile = p_out + o_m.to(tl.int64)[None, :] * stride_out + o_n[:, None]
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_m < M)[None, :])


# Not specialised: a launch compiles nothing that the warm-up with other numbers of tokens has not compiled.
@triton.jit(do_not_specialize=["M", "K", "n_stripes", "n_spans", "splits"])
def gemm_kernel(
    x,  # [M, K], rows `stride_x` apart
    words,  # [n_stripes, n_spans, P * W, 64] int16
    scales,  # [groups, n_stripes * 64]
    zeros,  # the same, uint8, read if HAS_ZERO
    token_scales,  # float32 [M], or None
    bias,  # [N], read if HAS_BIAS
    out,  # [M, N], rows `stride_out` apart
    partials,  # float32, read and written if SPLIT
    counters,  # int32, one per tile of the output, all zero between launches
    M,
    N,
    K,
    stride_x,
    stride_out,
    n_stripes,
    n_spans,
    splits,
    BITS: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    PTX: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_split = i_program % splits if SPLIT else 0
    i_tile = i_program // splits if SPLIT else i_program
    # Token tiles are neighbours in launch order: they read the same part of the weight at about the same time.
    n_m = tl.cdiv(M, BM)
    i_n = i_tile // n_m
    o_m = i_tile % n_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    n_part = tl.cdiv(n_spans, splits) if SPLIT else n_spans
    i_start = i_split * n_part
    i_stop = tl.minimum(i_start + n_part, n_spans)
    p_x = x + o_m.to(tl.int64) * stride_x
    b_acc = accumulate(
        words, scales, zeros, p_x, o_m < M, i_n, i_start, i_stop, n_stripes, n_spans, K,
        BITS, W, GROUP, HAS_ZERO, SCALED, RAGGED, BN, PTX,
    )  # fmt: skip
    if SPLIT:
        b_acc, is_last = meet(b_acc, partials, counters + i_tile, i_tile, i_split, splits, PTX)
        if is_last:
            write(b_acc, token_scales, bias, out, o_n, o_m, N, M, stride_out, HAS_BIAS)
    else:
        write(b_acc, token_scales, bias, out, o_n, o_m, N, M, stride_out, HAS_BIAS)


def gemm(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plan: tiles.Plan | None = None,
    token_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias: [M, N] in x's dtype from x [M, K] and bias [N], or into `out` [M, N] of any float dtype.

    x must be contiguous, the rows of out dense. Without a plan it takes the one of `tiles.plan_for`. `token_scales`
    float32 [M] multiply the float32 sums of each row of x W^T.
    """
    out = check(x, weight, bias, out)
    if token_scales is not None:
        check_tensor("token_scales", token_scales, (len(x),), (torch.float32,), x)
    if out.numel() == 0:
        return out
    machine = hardware.of(x.device)
    if plan is None:  # which is legal, and looked up
        plan = tiles.plan_for(len(x), weight.geometry, machine)
    elif reason := tiles.why_not(plan, len(x), weight.geometry, machine):
        raise ValueError(reason)
    programs = tiles.output_tiles(len(x), weight.geometry, plan.tile) * plan.splits
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        gemm_kernel[(programs,)](**arguments(x, weight, bias, out, plan, machine, token_scales))
    return out


def arguments(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: tiles.Plan,
    machine: hardware.Hardware,
    token_scales: torch.Tensor | None = None,
) -> dict:
    geometry = weight.geometry
    scratch = workspace.of_current_stream(x.device) if plan.splits > 1 else None
    return dict(
        x=x,
        token_scales=token_scales,
        bias=bias,
        out=out,
        partials=scratch.partials if scratch else None,
        counters=scratch.counters if scratch else None,
        M=len(x),
        N=geometry.rows,
        stride_x=geometry.columns,  # x is contiguous; torch says anything of the stride of a single row
        stride_out=out.stride(0),
        splits=plan.splits,
        HAS_BIAS=bias is not None,
        SPLIT=plan.splits > 1,
        BM=plan.tile.tokens,
        **walk_arguments(weight, plan.tile, x.dtype, machine),
    )


def walk_arguments(
    weight: RuntimeWeight | ExpertWeights, tile: tiles.Tile, dtype: torch.dtype, machine: hardware.Hardware
) -> dict:
    """What all kernels that call `k_loop.accumulate` are called with, besides tokens."""
    geometry = weight.geometry
    return dict(
        SCALED=tile.scaled and geometry.group != -1 and weight.scales.dtype == dtype,
        RAGGED=geometry.columns % geometry.span != 0,
        BN=tile.rows,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **weight_arguments(weight, machine),
    )


def weight_arguments(weight: RuntimeWeight | ExpertWeights, machine: hardware.Hardware) -> dict:
    """A weight's tensors and sizes, as kernels that read its scales name them."""
    geometry = weight.geometry
    return dict(
        words=weight.packed,
        scales=weight.scales,
        zeros=weight.zeros,
        K=geometry.columns,
        n_stripes=geometry.stripes,
        n_spans=geometry.spans,
        BITS=geometry.bits,
        W=geometry.slice,
        GROUP=geometry.group,
        HAS_ZERO=weight.zeros is not None,
        PTX=machine.ptx,
        **hardware.LAUNCH,
    )


def check(x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    """The output, made if there is none. Raises ValueError for what a launch cannot take."""
    weight.check_input(x, bias)
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x has shape {list(x.shape)} and strides {x.stride()}; it must be [M, K] and contiguous")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"x is on {x.device}; Triton needs a GPU, or TRITON_INTERPRET=1 before the first import")
    shape = (len(x), weight.geometry.rows)
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    dense = out.ndim == 2 and (out.stride(1) == 1 or out.shape[1] == 1)
    if out.shape != shape or out.dtype not in FLOATS or out.device != x.device or not dense:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; it must be float {list(shape)} with dense rows "
            f"on {x.device}"
        )
    return out
