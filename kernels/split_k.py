"""Split-K: store partial sums; the last program adds them in order and returns (sum, True).

There is no atomic addition of floats, and parts are added in their order whoever is last. The tile's counter is set
back to 0 for the next launch. Nobody waits, so any number of programs may share a GPU of any size.
"""

import triton
import triton.language as tl

from vlmq_vllm.kernels.k_loop import INTERPRETED


@triton.jit
def meet(b_acc, partials, p_counter, i_tile, i_part, n_parts, PTX: tl.constexpr):
    """Store this part's sums; the last program to arrive adds all parts in order and returns (sum, True).

    The stores of all threads must be done before one thread counts. On NVIDIA the barrier orders them before its atomic
    addition, whose release and acquire reach the whole GPU and order them before the loads of the last program; `.cg`
    keeps these from a stale line of the first-level cache. On AMD a barrier alone does not wait for the stores of other
    waves, so each waits for its own first.
    """
    BN: tl.constexpr = b_acc.shape[0]
    BM: tl.constexpr = b_acc.shape[1]
    o_sums = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    p_tile = partials + i_tile.to(tl.int64) * n_parts * (BN * BM) + o_sums
    tl.store(p_tile + i_part * (BN * BM), b_acc)
    if not PTX and not INTERPRETED:
        wait: tl.constexpr = "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0"
        tl.inline_asm_elementwise(wait, "=v,~{memory}", [], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    n_before = tl.atomic_add(p_counter, 1, sem="acq_rel")
    is_last = n_before == n_parts - 1
    if is_last:
        b_acc = tl.load(p_tile, cache_modifier=".cg")
        for i_other in range(1, n_parts):
            b_acc += tl.load(p_tile + i_other * (BN * BM), cache_modifier=".cg")
        tl.store(p_counter, 0)
    return b_acc, is_last
