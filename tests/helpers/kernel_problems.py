"""Random weights for the kernels' tests, and how far their products may lie from the exact ones."""

import pytest
import torch

from vlmq_vllm.format import BITS, QuantizedWeight, WeightFormat

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FORMATS = [pytest.param(bits, sym, id=f"w{bits}-{'sym' if sym else 'asym'}") for bits in BITS for sym in (True, False)]


def make_weight(bits, symmetric, rows, columns, group, dtype=FP16, device="cpu") -> QuantizedWeight:
    """Random codes and zero points, scales that make weights of about one half."""
    format = WeightFormat(bits, group, symmetric)
    groups = format.groups(columns)
    codes = torch.randint(0, format.levels, (rows, columns), dtype=torch.uint8, device=device)
    zero = None if symmetric else torch.randint(0, format.levels, (rows, groups), dtype=torch.uint8, device=device)
    scale = (torch.rand(rows, groups, device=device) + 0.5) / format.levels
    return QuantizedWeight(format, codes, scale.to(dtype), zero)


def exact(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64."""
    out = x.double() @ weight.dequantize().double().T
    return out if bias is None else out + bias.double()


def empty(*shape: int, dtype=FP16, device="cpu") -> torch.Tensor:
    """Memory full of NaN, in which an output that is never written shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of what is expected; NaN where either holds one."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def bound(dtype: torch.dtype, columns: int, rounded_weight: bool = False) -> float:
    """How far a product rounded to `dtype` may lie from the exact one, as relative RMS.

    Rounding the result moves no element by more than half a step, eps / 2. Before it, each of `columns` float32 sums
    loses up to 2^-23 (tensor cores cut instead of rounding); losses of random sign add up like sqrt(columns), and the
    factor 2 is the room for them not being quite so. A weight that was rounded before loses eps / 2 once more.
    """
    return torch.finfo(dtype).eps / 2 * (1 + rounded_weight) + 2 * columns**0.5 * 2**-23
