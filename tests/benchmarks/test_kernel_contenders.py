"""Copies, the check of results, and the kernels that run on a CPU, as the kernel benchmark has them."""

import pytest
import torch

from benchmarks.kernel import contenders, gpu_timing
from benchmarks.kernel.cases import BITS, Layer, weight_bytes
from kernel_problems import BF16, FP16, FP32


def test_copies():
    """Enough to push a copy out of L2, few enough for their limit, and one at least; graphs hold whole rounds."""
    assert gpu_timing.copies_needed(weight=100, moved=150, l2=1000) == 27
    assert gpu_timing.copies_needed(weight=1 << 30, moved=1, l2=1000) == 2
    assert gpu_timing.copies_needed(weight=3 << 30, moved=3 << 30, l2=1000) == 1
    assert gpu_timing.launches_needed(copies=27, floor=2.0) == 81
    assert gpu_timing.launches_needed(copies=3, floor=400.0) == 3
    assert gpu_timing.launches_needed(copies=1, floor=5000.0) == 1


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_check(dtype, symmetric):
    """The exact product rounded once passes for one rounding; that of the rounded weight for two."""
    format = gpu_timing.WeightFormat(3, 64, symmetric)
    weight = gpu_timing.draw(format, 300, 200, dtype, "cpu")
    oracle = gpu_timing.Oracle(weight)
    x = torch.randn(9, 200).to(dtype)
    exact = x.double() @ weight.dequantize().double().T
    assert 0 < oracle.check(x, [exact.to(dtype)], 1) < gpu_timing.bound(dtype, 200, 1)
    oracle.check(x, [(x.double() @ weight.dequantize(dtype).double().T).to(dtype)], 2)
    with pytest.raises(gpu_timing.Wrong, match="relative RMS error is .* above"):
        oracle.check(x, [exact.to(dtype), (exact * 1.02).to(dtype)], 2)


def test_check_of_whole_output():
    """A NaN is found outside of the sample, too, and so is an output of another shape."""
    weight = gpu_timing.draw(gpu_timing.WeightFormat(2, 32, True), 600, 64, FP32, "cpu")
    oracle = gpu_timing.Oracle(weight)
    x = torch.randn(400, 64)
    out = x @ weight.dequantize().T
    assert len(oracle.rows) == gpu_timing.SAMPLE
    oracle.check(x, [out], 1)
    for row in (0, 599):
        poisoned = out.clone()
        poisoned[399, row] = torch.nan
        with pytest.raises(gpu_timing.Wrong, match="NaN or infinity is left"):
            oracle.check(x, [poisoned], 1)
    with pytest.raises(gpu_timing.Wrong, match=r"its output is \[400, 599\], not \[400, 600\]"):
        oracle.check(x, [out[:, 1:]], 1)


def test_copies_are_their_own():
    made = []
    packed = contenders.Packed({"weight": torch.ones(4)}, lambda copy: made.append(copy) or (lambda x: x))
    assert len(packed.products(3)) == 3 and packed.nbytes == 16
    assert len({copy["weight"].data_ptr() for copy in made} | {packed.tensors["weight"].data_ptr()}) == 4


def test_accepted():
    """Arguments that another version of a peer does not have are left out."""
    assert contenders.accepted(lambda a, perm: (a, perm), perm=2)(a=1) == (1, 2)
    assert contenders.accepted(lambda a: a, perm=2)(a=1) == 1


def test_absent():
    missing = contenders.Kernel("X", (4,), None, modules=("no_such_peer",))
    assert missing.why_absent() == "import no_such_peer: ModuleNotFoundError: No module named 'no_such_peer'"
    old = contenders.Kernel("X", (4,), None, operators=("no_such_operator",))
    assert old.why_absent() == "this vLLM has no operator no_such_operator"
    assert contenders.KERNELS["marlin"].why_not(3, True) == "takes 4 bits"
    assert "symmetric" in contenders.KERNELS["humming"].why_not(3, False)
    assert contenders.KERNELS["vlmq"].why_not(3, False) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_ours_and_dense(bits, symmetric, device):
    """The two kernels that run anywhere, with copies of their weight, pass the benchmark's own check."""
    weight = gpu_timing.draw(gpu_timing.WeightFormat(bits, 128, symmetric), 72, 512, FP16, device)
    x = torch.randn(3, 512, device=device).to(FP16)
    oracle = gpu_timing.Oracle(weight)
    for name in ("vlmq", "cublas"):
        kernel = contenders.KERNELS[name]
        assert kernel.why_absent() is None
        packed = kernel.pack(weight, FP16)
        oracle.check(x, [product(x) for product in packed.products(2)], kernel.roundings)
        assert packed.nbytes >= weight_bytes(Layer("", "", 512, 72), 16 if name == "cublas" else bits)
