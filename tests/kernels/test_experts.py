"""Products of a mixture of experts against float64, and the sorting of tokens by expert."""

import pytest
import torch

from kernel_problems import BF16, FP16, bound, make_weight, rel_rms
from vlmq_vllm.kernels import tiles, torch_ops, warmup
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.experts import multiply, routing
from vlmq_vllm.kernels.repack import prepare
from vlmq_vllm.kernels.tiles import Tile


def expected(x, weights, ids, bias, router):
    """The definition, entry by entry."""
    out = torch.zeros(*ids.shape, len(weights[0].codes), dtype=torch.float64, device=x.device)
    for t, i in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        expert, row = int(ids[t, i]), x[t, i] if x.ndim == 3 else x[t]
        if 0 <= expert < len(weights):
            product = row.double() @ weights[expert].dequantize().double().T
            product = product if bias is None else product + bias[expert].double()
            out[t, i] = product if router is None else product * router[t, i].double()
    return out


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_multiply(bits, symmetric, device):
    """Experts with many tokens, few and none, ids that are no expert of here, odd sizes, bias and router weights."""
    weights = [make_weight(bits, symmetric, 70, 200, 64, device=device) for _ in range(5)]
    experts = ExpertWeights.stack([prepare(weight) for weight in weights], len(weights))
    ids = torch.randint(-1, 4, (21, 3), device=device, dtype=torch.int32)
    ids[0, 0] = 5  # beyond the last
    assert 4 not in ids
    x = torch.randn(21, 200, device=device).to(FP16)
    bias, router = torch.randn(5, 70, device=device).to(FP16), torch.rand(21, 3, device=device)
    for tile in (None, Tile(128, 16, 4, 2), Tile(64, 32, 4, 2, scaled=True)):
        out = multiply(x, experts, ids, bias, router, tile)
        assert rel_rms(out, expected(x, weights, ids, bias, router)) <= bound(FP16, 200, rounded_weight=True)
        assert not out[(ids < 0) | (ids > 4)].any()


def test_own_inputs(device):
    """The second product of an expert: every entry brings its own input."""
    weights = [make_weight(4, True, 40, 96, 32, device=device) for _ in range(3)]
    experts = ExpertWeights.stack([prepare(weight) for weight in weights], len(weights))
    ids, x = torch.randint(0, 3, (7, 2), device=device), torch.randn(7, 2, 96, device=device).to(FP16)
    out = multiply(x, experts, ids)
    assert rel_rms(out, expected(x, weights, ids, None, None)) <= bound(FP16, 96)
    assert multiply(x[:0], experts, ids[:0]).shape == (0, 2, 40)
    assert torch.equal(experts[1].packed, prepare(weights[1]).packed)


@pytest.mark.parametrize("call", [torch.ops.vlmq.experts_v1, torch_ops.experts_on_gpu, torch_ops.experts_on_cpu])
def test_op(call, device):
    weights = [make_weight(2, False, 40, 96, 32, device=device) for _ in range(3)]
    experts = ExpertWeights.stack([prepare(weight) for weight in weights], len(weights))
    ids, x = torch.randint(-1, 4, (7, 2), device=device), torch.randn(7, 96, device=device).to(FP16)
    bias, router = torch.randn(3, 40, device=device).to(FP16), torch.rand(7, 2, device=device)
    given = (x, experts.packed, experts.scales, experts.zeros, ids, bias, router, 2, 32, 40, 96)
    assert rel_rms(call(*given), expected(x, weights, ids, bias, router)) <= bound(FP16, 96)
    if call is torch.ops.vlmq.experts_v1:
        torch.library.opcheck(call.default, given, test_utils=("test_schema", "test_faketensor"))


def test_warm_up(device, monkeypatch):
    """A launch with every tile of the table."""
    experts = ExpertWeights.stack([prepare(make_weight(4, True, 40, 96, 32, device=device)) for _ in range(3)], 3)
    chosen = []
    monkeypatch.setattr(warmup, "_done", set())
    monkeypatch.setattr(
        warmup, "multiply_experts", lambda x, experts, ids, *rest: chosen.append(-(-ids.numel() // len(experts)))
    )
    for _ in range(2):
        warmup.warm_experts(experts, 2, FP16, with_router=True)
    assert chosen == list(tiles.BUCKETS)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize(("tokens", "each", "experts"), [(1, 1, 1), (1, 8, 128), (50, 2, 3), (3, 3, 2)])
def test_routing(tokens, each, experts, block):
    """Every entry once, in blocks of one expert; the blocks' number depends on sizes only, as a CUDA graph wants it."""
    ids = torch.randint(-1, experts + 1, (tokens, each))
    entries, owners = routing(ids, experts, block)
    assert len(entries) == len(owners) * block
    assert sorted(entries[entries < ids.numel()].tolist()) == list(range(ids.numel()))
    for i, owner in enumerate(owners.tolist()):
        for entry in entries[i * block : (i + 1) * block].tolist():
            if entry < ids.numel():
                expert = int(ids.flatten()[entry])
                assert owner == (expert if 0 <= expert < experts else -1)
    for same in (torch.zeros_like(ids), torch.full_like(ids, -1)):
        assert len(routing(same, experts, block)[1]) == len(owners)
        assert (routing(same, experts, block)[0] < ids.numel()).sum() == ids.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, dtype=torch.int32)}, "ids is torch.int32 \\[4\\]"),
        ({"ids": torch.zeros(4, 2)}, "ids is torch.float32"),
        ({"x": torch.ones(3, 96).half()}, "x has shape \\[3, 96\\]; it must be \\[4, 96\\] or \\[4, 2, 96\\]"),
        ({"x": torch.ones(4, 96)}, "x is torch.float32"),
        ({"bias": torch.ones(40).half()}, "bias has shape \\[40\\]; this weight needs \\[2, 40\\]"),
        ({"router": torch.ones(4)}, "router has shape \\[4\\]"),
        ({"tile": Tile(96, 16, 4, 2)}, "rows is 96"),
    ],
)
def test_refused(change, message, device):
    experts = ExpertWeights.stack([prepare(make_weight(4, True, 40, 96, 32, device=device)) for _ in range(2)], 2)
    given = {"x": torch.ones(4, 96).half(), "ids": torch.zeros(4, 2, dtype=torch.int32)} | change
    with pytest.raises(ValueError, match=message):
        multiply(experts=experts, **{name: x.to(device) if hasattr(x, "to") else x for name, x in given.items()})
    with pytest.raises(ValueError, match="scales is of 1 experts, packed of 2"):
        ExpertWeights(experts.geometry, experts.packed, experts.scales[:1], None)
    other = prepare(make_weight(3, True, 40, 96, 32, BF16, device=device))
    with pytest.raises(ValueError, match="expert 1 is .* they must be alike"):
        ExpertWeights.stack([experts[0], other], 2)
