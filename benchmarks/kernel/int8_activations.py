"""Holds what the kernel benchmark needs for activations of 8 bits: what products get as x, their check, and the peers.

Tokens are rounded before any product is timed, ours or a peer's, so that no time holds the rounding; and each gets them
in the form that it takes, ours as integers in 16 bits, the peers as bytes. The exact product is that of the rounded
tokens with the dequantised weight.
"""

from dataclasses import dataclass

import torch

from benchmarks.kernel.gpu_timing import Oracle, Product
from benchmarks.kernel.interface import Packed, Tensors
from vlmq_vllm.activations import quantize_tokens
from vlmq_vllm.format import QuantizedWeight


@dataclass(frozen=True)
class Rounded:
    """Integers q [M, K] of 16 bits, the same as bytes, and scales [M, 1] float32; drawn anew in place like a tensor."""

    q: torch.Tensor
    bytes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> "Rounded":
        q, scales = quantize_tokens(x)
        return cls(q, q.to(torch.int8), scales)

    @property
    def device(self) -> torch.device:
        return self.q.device

    def normal_(self, generator: torch.Generator | None = None) -> "Rounded":
        """New random tokens in the same memory."""
        drawn = Rounded.of(torch.empty_like(self.q).normal_(generator=generator))
        for name in ("q", "bytes", "scales"):
            getattr(self, name).copy_(getattr(drawn, name))
        return self


@dataclass(frozen=True)
class RoundedOracle:
    """The exact product with `Rounded` tokens, to be asked like the `Oracle` of the weight that it holds."""

    exact: Oracle

    def check(self, x: Rounded, outs: list[torch.Tensor], roundings: int) -> float:
        """Largest relative RMS error of the outputs [M, N], each token's as large as the others' before its scale.

        Dividing by scales rounds once more, in float32: nothing beside the 16 bits of the result.
        """
        return max(self.exact.check(x.q, [out / x.scales], roundings) for out in outs)


def cutlass(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """What vLLM's CutlassInt8ScaledMMLinearKernel does with tokens that are rounded already; one scale per row."""
    from vllm import _custom_ops as ops

    def bind(copy: Tensors) -> Product:
        return lambda x: ops.cutlass_scaled_mm(x.bytes, copy["b"].T, x.scales, copy["scale_b"], dtype)

    return Packed({"b": centred(weight), "scale_b": weight.scale.float()}, bind)


def int_mm(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """torch's own product of bytes, and torch for the scales: int32 and float32 of the result's size in between."""

    def bind(copy: Tensors) -> Product:
        def product(x: Rounded) -> torch.Tensor:
            sums = torch._int_mm(x.bytes, copy["b"].T) * copy["scale_b"]
            return torch.mul(sums, x.scales, out=torch.empty_like(sums, dtype=dtype))

        return product

    return Packed({"b": centred(weight), "scale_b": weight.scale.float().T.contiguous()}, bind)


def centred(weight: QuantizedWeight) -> torch.Tensor:
    """Codes of a symmetric weight as signed bytes [N, K]."""
    return (weight.codes.int() - weight.format.middle).to(torch.int8)
