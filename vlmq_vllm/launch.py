"""What a loaded layer runs: a list of launches, each a matrix product that gives a slice of the layer's outputs.

    triton  one segment through `kernels/`                        tensors packed, scales, zeros
    int4    neighbouring segments widened for vLLM's CPU kernel   tensors packed, scales, zeros (`cpu.py`)
    dense   a weight at 16 bits, kept so or dequantised once      tensor weight

The caller keeps the tensors; a Launch itself holds numbers only. Which kind a weight gets is decided here, and a
weight that has to be dequantised is named in the log with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from vllm.logger import init_logger

from vlmq_vllm import cpu
from vlmq_vllm.format import QuantizedWeight

logger = init_logger(f"vllm.{__name__}")

Tensors = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Piece:
    """A segment's weight after loading: quantised or a dense tensor [O, I], with its checkpoint name."""

    name: str
    weight: QuantizedWeight | torch.Tensor

    @property
    def device(self) -> torch.device:
        return (self.weight.codes if isinstance(self.weight, QuantizedWeight) else self.weight).device


@dataclass(frozen=True)
class Launch:
    """One product of `rows` outputs; bits, group_size and columns only for "triton", isa only for "int4"."""

    kind: str
    rows: int
    bits: int = 0
    group_size: int = 0
    columns: int = 0
    isa: str = ""

    def run(self, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [M, columns] times the weight, plus bias [rows]: [M, rows]."""
        if self.kind == "dense":
            return torch.nn.functional.linear(x, tensors["weight"], bias)
        packed, scales, zeros = tensors["packed"], tensors["scales"], tensors["zeros"]
        if self.kind == "int4":
            return cpu.int4_linear(x, packed, scales, zeros, bias, self.rows, self.isa)
        return torch.ops.vlmq.gemm_v1(x, packed, scales, zeros, bias, self.bits, self.group_size, self.columns)


def prepare(pieces: list[Piece], dtype: torch.dtype) -> list[tuple[Launch, Tensors]]:
    """The launches of a layer and their tensors for activations of `dtype`."""
    launches = []
    for kind, group in groupby(pieces, key=lambda piece: _kind(piece, dtype)):
        members = list(group)
        if kind == "int4":
            launches.append(_int4([piece.weight for piece in members], dtype))
        else:
            launches += [(_triton if kind == "triton" else _dense)(piece.weight, dtype) for piece in members]
    return launches


def _kind(piece: Piece, dtype: torch.dtype) -> str:
    if not isinstance(piece.weight, QuantizedWeight):
        return "dense"
    fast, reason = "int4", None
    if piece.device.type == "cpu":
        reason = cpu.why_not_int4(piece.weight.format, dtype)
    else:
        from vlmq_vllm.kernels.layout import why_not

        fast, reason = "triton", why_not(piece.weight.format, *piece.weight.codes.shape)
    if reason is None:
        return fast
    logger.warning_once("Weights are dequantised to %s at load and take its full memory: %s", dtype, reason)
    logger.debug("%s is dequantised at load: %s", piece.name, reason)
    return "dense"


def _dense(weight: QuantizedWeight | torch.Tensor, dtype: torch.dtype) -> tuple[Launch, Tensors]:
    dense = weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.clone()
    return Launch("dense", len(dense)), {"weight": dense}


def _int4(weights: list[QuantizedWeight], dtype: torch.dtype) -> tuple[Launch, Tensors]:
    rows = sum(len(weight.codes) for weight in weights)
    return Launch("int4", rows, isa=cpu.isa(dtype)), cpu.widen(weights, dtype)


def _triton(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Launch, Tensors]:
    from vlmq_vllm.kernels import layout, op  # noqa: F401, importing op defines torch.ops.vlmq

    ready = layout.prepare(weight, dtype)
    launch = Launch("triton", ready.rows, ready.bits, ready.group_size, ready.columns)
    return launch, {"packed": ready.packed, "scales": ready.scales, "zeros": ready.zeros}
