"""Which way a product takes, dequantising, batch-invariant products, the warm-up and the workspaces."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch

from kernel_problems import FP16, bound, empty, exact, make_weight, rel_rms
from vlmq_vllm.format import BITS
from vlmq_vllm.kernels import dequantize, dispatch, gemm, hardware, tiles, warmup, workspace
from vlmq_vllm.kernels.repack import prepare


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 33, 32), (129, 257, 128), (70, 200, -1), (65, 600, 512)])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize(bits, rows, columns, group, symmetric, device):
    """The kernel's weights are the checkpoint's, rounded once; the product with them in pieces of 64 rows."""
    weight = make_weight(bits, symmetric, rows, columns, group, device=device)
    runtime = prepare(weight)
    widened = dequantize.dequantize(runtime, empty(columns, -(-rows // 64) * 64, device=device))
    assert torch.equal(widened[:, :rows].T, weight.dequantize(FP16)) and not widened[:, rows:].any()
    x = torch.randn(5, columns, device=device).to(FP16)
    for bias in (None, torch.randn(rows, device=device).to(FP16)):
        out = empty(5, rows, device=device)
        dequantize.gemm(x, runtime, bias, out, piece=1)
        assert rel_rms(out, exact(x, weight, bias)) <= bound(FP16, columns, rounded_weight=True)


def test_pieces(device):
    """About equal, of PIECE bytes where tokens are many, larger where some multiprocessors would have no work."""
    down, h200 = prepare(make_weight(2, True, 64, 64, 32)), hardware.Hardware("sm_90", 132, 227 << 10)
    geometry = dataclasses.replace(down.geometry, rows=3584, columns=18944)
    weight = SimpleNamespace(geometry=geometry)
    for m, pieces in ((512, 1), (1024, 1), (2048, 3), (4096, 6), (100000, 8)):
        stripes = dequantize.stripes_at_once(m, weight, h200)
        assert -(-geometry.stripes // stripes) == pieces
        assert m * stripes * 64 >= 132 * 128 * 128 or pieces == 1
    assert dequantize.stripes_at_once(1 << 20, weight, h200, piece=1) == 1


def test_many_tokens_are_dequantised(device, monkeypatch):
    """From the table's number on; below it the fused kernel works."""
    ways = []
    for module in (gemm, dequantize):
        real = module.gemm

        def watched(*args, real=real, name=module.__name__, **options):
            ways.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, "gemm", watched)
    monkeypatch.setattr(tiles, "dequantize_from", lambda machine: 20)
    weights = [prepare(make_weight(bits, True, 20, 96, 32, device=device)) for bits in (2, 4)]
    for m, way in ((19, gemm), (20, dequantize)):
        ways.clear()
        dispatch.multiply(torch.ones(m, 96, dtype=FP16, device=device), weights)
        assert ways == [way.__name__] * 2


def test_batch_invariant(device, monkeypatch):
    """What a token gets is the same to the bit in any company, though its products are divided and tokens are many."""
    weight = make_weight(3, False, 70, 1600, 128, device=device)
    runtime = prepare(weight)
    plan = tiles.plan_for(tiles.INVARIANT, runtime.geometry, hardware.of(torch.device(device)))
    if plan.splits == 1:
        plan = tiles.Plan(plan.tile, runtime.geometry.spans)
        monkeypatch.setattr(tiles, "plan_for", lambda *args: plan)
    monkeypatch.setattr(tiles, "tokens_at_once", lambda *args: plan.tile.tokens)
    x = torch.randn(70, 1600, device=device).to(FP16)
    together = dispatch.multiply(x, [runtime], batch_invariant=True)
    assert rel_rms(together, exact(x, weight)) <= bound(FP16, 1600, rounded_weight=True)
    for part in (slice(0, 1), slice(3, 12), slice(31, 66)):
        assert torch.equal(dispatch.multiply(x[part], [runtime], batch_invariant=True), together[part])


def test_warm_up(device, monkeypatch):
    """Launches with every tile and by cuBLAS, with and without bias, once for layers of the same sizes."""
    calls = []
    monkeypatch.setattr(warmup, "multiply", lambda x, weights, bias, *_: calls.append((len(x), bias is not None)))
    monkeypatch.setattr(warmup, "_done", set())
    weights = [prepare(make_weight(4, True, 20, 96, 32, device=device))]
    for _ in range(2):
        warmup.warm(weights, FP16, with_bias=True)
    tokens = warmup.tokens(hardware.of(torch.device(device)))
    assert calls == [(m, bias) for m in tokens for bias in (False, True)]
    assert max(tokens) == tiles.dequantize_from(hardware.of(torch.device(device)))
    warmup.warm(weights, FP16, with_bias=False)
    assert len(calls) == 3 * len(tokens)


def test_workspaces(monkeypatch):
    """One for each stream, made ahead; during a capture none can be made, and the error says what to call before."""
    monkeypatch.setattr(workspace, "_spare", {})
    monkeypatch.setattr(workspace, "_taken", {})
    made = []
    monkeypatch.setattr(workspace, "_allocate", lambda device: made.append(threading.get_ident()) or object())
    device, stream, capturing = torch.device("cuda:0"), [7], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": stream[0]}))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    workspace.reserve(device, 2)
    assert len(made) == 2
    first = workspace.of_current_stream(device)
    stream[0], capturing[0] = 8, True
    second = workspace.of_current_stream(device)
    assert second is not first and workspace.of_current_stream(device) is second and len(made) == 2
    stream[0] = 9
    with pytest.raises(RuntimeError, match="workspace.reserve\\(device, streams=...\\)"):
        workspace.of_current_stream(device)
    capturing[0] = False
    assert workspace.of_current_stream(device) not in (first, second)
    workspace.reserve(device, 3)
    assert len(made) == 3
    workspace.reserve(device, 4)
    assert len(made) == 4
    assert threading.get_ident() not in made  # this thread's memory pool may be a graph's, or one that sleep discards


def test_counters_are_zero_after_every_launch(device):
    weight = prepare(make_weight(4, True, 70, 1100, -1, device=device))
    for splits in (2, 5):
        plan = tiles.Plan(tiles.Tile(64, 16, 2, 2), splits)
        gemm.gemm(torch.ones(40, 1100, dtype=FP16, device=device), weight, plan=plan)
        assert not workspace.of_current_stream(torch.device(device)).counters.any()
