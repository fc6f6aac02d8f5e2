"""Multiplies every token with the weights of the experts that it is routed to, in one launch.

    out[t, i] = router[t, i] * (x[t, i] W[ids[t, i]]^T + bias[ids[t, i]])

Entries (t, i) are sorted by expert and filled up to whole tiles (`routing`), so that a program works for one expert
only; the product is the loop of `k_loop.py`. K is not divided: several experts times the tiles of each fill a GPU. All
on the device, without waiting for it, so that CUDA graphs can hold it.
"""

import torch
import triton
import triton.language as tl

from vlmq_vllm.kernels import hardware, tiles
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.gemm import walk_arguments
from vlmq_vllm.kernels.k_loop import accumulate
from vlmq_vllm.kernels.layout import STRIPE, aligned


@triton.jit(do_not_specialize=["n_entries", "n_each", "K", "n_stripes", "n_spans"])
def experts_kernel(
    x,  # [n_entries / n_each, K]
    words,  # [experts, n_stripes, n_spans, P * W, 64] int16
    scales,  # [experts, groups, n_stripes * 64]
    zeros,
    bias,  # [experts, N]
    router,  # [n_entries]
    out,  # [n_entries, N]
    entries,  # [blocks * BM] int32: rows of out, n_entries where filled up
    owners,  # [blocks] int32: the expert of a block, -1 for ids that are no expert of here
    n_entries,
    n_each,  # entries that share a row of x
    N,
    K,
    stride_x,
    stride_out,
    stride_words,
    stride_scales,
    n_stripes,
    n_spans,
    BITS: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROUTER: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    PTX: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_n = tl.program_id(1)
    o_entry = tl.load(entries + i_block * BM + tl.arange(0, BM))
    m_entry = o_entry < n_entries
    i_owner = tl.load(owners + i_block)
    o_n = i_n * BN + tl.arange(0, BN)
    m_out = (o_n < N)[:, None] & m_entry[None, :]
    p_out = out + o_entry.to(tl.int64)[None, :] * stride_out + o_n[:, None]
    if i_owner < 0:
        tl.store(p_out, tl.zeros((BN, BM), dtype=out.dtype.element_ty), mask=m_out)
    else:
        i_expert = i_owner.to(tl.int64)
        p_x = x + (o_entry // n_each).to(tl.int64) * stride_x
        words += i_expert * stride_words
        scales += i_expert * stride_scales
        if HAS_ZERO:
            zeros += i_expert * stride_scales
        b_acc = accumulate(
            words, scales, zeros, p_x, m_entry, i_n, 0, n_spans, n_stripes, n_spans, K,
            BITS, W, GROUP, HAS_ZERO, SCALED, RAGGED, BN, PTX,
        )  # fmt: skip
        if HAS_BIAS:
            b_acc += tl.load(bias + i_expert * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
        if HAS_ROUTER:
            b_acc *= tl.load(router + o_entry, mask=m_entry, other=0.0).to(tl.float32)[None, :]
        tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_out)


def routing(ids: torch.Tensor, n_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(entries [blocks * block], owners [blocks]) int32 of ids [tokens, experts each].

    Entry numbers, sorted by expert and filled up with their number to whole blocks, and each block's expert; ids that
    are no expert of here share blocks whose owner is -1. The number of blocks is the most that there can be.
    """
    flat = ids.flatten().long()
    here = torch.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    count = len(flat)
    most = min(count, n_experts + 1) + max(count - 1, 0) // block + 1
    counts = torch.zeros(n_experts + 1, dtype=torch.long, device=ids.device)
    counts.scatter_add_(0, here, torch.ones_like(here))
    ends = ((counts + block - 1) // block).cumsum(0)  # blocks up to each expert's last
    order = here.argsort(stable=True)
    rank = torch.arange(count, device=ids.device) - (counts.cumsum(0) - counts)[here[order]]
    first = (ends * block).roll(1)
    first[0] = 0
    entries = torch.full((most * block,), count, dtype=torch.int32, device=ids.device)
    entries[first[here[order]] + rank] = order.int()
    owners = torch.searchsorted(ends, torch.arange(most, device=ids.device), right=True)
    return entries, torch.where(owners < n_experts, owners, -1).int()


def multiply(
    x: torch.Tensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    router: torch.Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> torch.Tensor:
    """[tokens, experts each, N] in x's dtype, as above.

    x is [tokens, K], or [tokens, experts each, K] where every entry has its own input; ids [tokens, experts each], of
    which those that are no expert of here give zeros; bias [experts, N]; router [tokens, experts each].
    """
    experts.check_input(x, ids, bias, router)
    geometry, machine = experts.geometry, hardware.of(x.device)
    out = torch.empty(*ids.shape, geometry.rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if tile is None:  # which is legal, and looked up
        tile = tiles.plan_for(-(-ids.numel() // len(experts)), geometry, machine).tile
    elif reason := tiles.why_not(tiles.Plan(tile), ids.numel(), geometry, machine):
        raise ValueError(reason)
    entries, owners = routing(ids, len(experts), tile.tokens)
    with torch.cuda.device_of(x):
        experts_kernel[(len(owners), -(-geometry.stripes * STRIPE // tile.rows))](
            **arguments(aligned(x), experts, ids, bias, router, out, entries, owners, tile, machine)
        )
    return out


def arguments(
    x: torch.Tensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    router: torch.Tensor | None,
    out: torch.Tensor,
    entries: torch.Tensor,
    owners: torch.Tensor,
    tile: tiles.Tile,
    machine: hardware.Hardware,
) -> dict:
    geometry = experts.geometry
    return dict(
        x=x,
        bias=bias,
        router=None if router is None else router.contiguous(),
        out=out,
        entries=entries,
        owners=owners,
        n_entries=ids.numel(),
        n_each=1 if x.ndim == 3 else ids.shape[1],
        N=geometry.rows,
        stride_x=geometry.columns,
        stride_out=geometry.rows,
        stride_words=experts.packed.stride(0),
        stride_scales=experts.scales.stride(0),
        HAS_BIAS=bias is not None,
        HAS_ROUTER=router is not None,
        BM=tile.tokens,
        **walk_arguments(experts, tile, x.dtype, machine),
    )
