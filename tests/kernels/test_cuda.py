"""What only a GPU can show: CUDA graphs, streams beside each other, no compilation after the warm-up, Inductor."""

import pytest
import torch

from kernel_problems import BF16, bound, exact, make_weight, rel_rms
from vlmq_vllm.kernels import experts, hardware, tiles, workspace
from vlmq_vllm.kernels.dispatch import multiply
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.repack import prepare
from vlmq_vllm.kernels.warmup import warm

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: graphs, streams and real compilation"
)
COLUMNS = 2000  # ragged at every width


@pytest.fixture
def weight():
    return make_weight(3, False, 200, COLUMNS, 128, BF16, "cuda")


def tokens(m: int) -> torch.Tensor:
    return torch.randn(m, COLUMNS, device="cuda", dtype=BF16)


def agrees(out: torch.Tensor, x: torch.Tensor, weight) -> bool:
    return rel_rms(out, exact(x, weight)) <= bound(BF16, COLUMNS, rounded_weight=True)


@pytest.mark.parametrize("m", [1, 16, 64, 100, 600])
def test_graph(weight, m):
    """Replays with new inputs, many times: the counters of divided products are reset by each."""
    runtime, x = prepare(weight), tokens(m)
    warm([runtime], BF16, with_bias=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply(x, [runtime])
    for _ in range(20):
        x.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert agrees(out, x, weight)


def test_streams(weight):
    """Two streams at once, each with products of the same weight that meet in a workspace."""
    runtime = prepare(weight)
    warm([runtime], BF16, with_bias=False)
    assert tiles.plan_for(8, runtime.geometry, hardware.of(torch.device("cuda", 0))).splits > 1
    streams, inputs = [torch.cuda.Stream() for _ in range(2)], [tokens(8) for _ in range(2)]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(multiply(inputs[i], [runtime]))
    torch.cuda.synchronize()
    for i in range(2):
        assert agrees(outs[i][0], inputs[i], weight)
        assert all(torch.equal(out, outs[i][0]) for out in outs[i])  # the parts are added in one order


def test_nothing_compiles_after_the_warm_up(weight):
    """As vLLM's monitor in its mode "error": any number of tokens, with and without bias."""
    import triton

    runtime = prepare(weight)
    warm([runtime], BF16, with_bias=True)
    compiled = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["fn"].name)
    try:
        for m in (1, 2, 7, 8, 9, 31, 64, 65, 129, 400, 511, 512, 3000):
            for bias in (None, torch.randn(200, device="cuda", dtype=BF16)):
                assert multiply(tokens(m), [runtime], bias).shape == (m, 200)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert compiled == []


def test_inductor(weight):
    """Its graphs are warmed up in their own memory, where no workspace may be made, and there may be none in spare."""
    from vlmq_vllm.kernels import torch_ops  # noqa: F401, defines the operator

    runtime = prepare(weight)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def layer(x):
        shape = runtime.geometry
        tensors = ([runtime.packed], [runtime.scales], [runtime.zeros])
        return torch.ops.vlmq.linear_v1(x + 1, *tensors, None, [3], [128], [shape.rows], COLUMNS, False) * 2

    for _ in range(4):
        x = tokens(8)
        assert torch.equal(layer(x), multiply(x + 1, [runtime]) * 2)


def test_experts_in_a_graph():
    """Routing is part of the graph: other experts at every replay."""
    weights = [make_weight(4, True, 200, COLUMNS, 128, BF16, "cuda") for _ in range(4)]
    stacked, x = ExpertWeights.stack([prepare(weight) for weight in weights], len(weights)), tokens(9)
    ids = torch.zeros(9, 1, dtype=torch.int32, device="cuda")
    experts.multiply(x, stacked, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts.multiply(x, stacked, ids)
    for expert in range(4):
        ids.fill_(expert)
        graph.replay()
        assert agrees(out[:, 0], x, weights[expert])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_tokens(bits, symmetric):
    """Dequantising and cuBLAS: no interpreter has the register pairs of this kernel."""
    weight, x = make_weight(bits, symmetric, 300, COLUMNS, 64, BF16, "cuda"), tokens(700)
    assert agrees(multiply(x, [prepare(weight)]), x, weight)


def test_workspace_outlives_a_memory_pool(weight):
    """A set is not made in the pool that is in use: vLLM's sleep mode discards that of the weights."""
    runtime, x, stream = prepare(weight), tokens(8), torch.cuda.Stream()
    pool = torch.cuda.MemPool()
    torch.cuda.synchronize()
    with torch.cuda.use_mem_pool(pool), torch.cuda.stream(stream):
        multiply(x, [runtime])
    torch.cuda.synchronize()
    addresses = [(segment["address"], segment["total_size"]) for segment in pool.snapshot()]
    with torch.cuda.stream(stream):
        counters = workspace.of_current_stream(x.device).counters.data_ptr()
    assert not any(start <= counters < start + size for start, size in addresses)
