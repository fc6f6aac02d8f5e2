"""Computes integrated gradients of the quantisation error along a straight path to a module's input (QIG, 2603.17809).

For a module M, the same module Mq quantised, and an input Z1 [B, T, C] of M,

    F(Z)  = sum_t mean_h | M(Z) - Mq(Z) |_th
    IG_tc = (Z1 - Z0)_tc * int_0^1 dF / dZ_tc at Z0 + a (Z1 - Z0) da,        sum_tc IG_tc = F(Z1) - F(Z0)

with the integral as a mean over K midpoints a = (k - 1/2) / K (32 in the paper). Z0 is zero, or what the caller says.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from vlmq_vllm.offline.model.streams import Call, hidden_of

STEPS = 32  # K
Switch = Callable[[], AbstractContextManager]


def input_of(call: Call) -> torch.Tensor:
    """The input among the arguments: the first, or the one named hidden_states."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def integrated_gradients(
    module: torch.nn.Module,
    quantized: Switch,
    call: Call,
    start: torch.Tensor | None = None,
    steps: int = STEPS,
) -> torch.Tensor:
    """IG [N, C] float32, signed, for the N = B T tokens of the input of `call` [B, T, C] (or [N, C]).

    quantized: a context manager that makes `module` the quantised one for a while. start: Z0, zero if None.
    """
    end = input_of(call).detach()
    start = torch.zeros_like(end) if start is None else start.detach()
    total = torch.zeros_like(end)
    for step in range(steps):
        point = torch.lerp(start, end, (step + 0.5) / steps).requires_grad_()
        with torch.enable_grad():
            total += torch.autograd.grad(distance(module, quantized, call, point), point)[0]
    return ((end - start) * total / steps).flatten(0, -2).float()


def distance(module: torch.nn.Module, quantized: Switch, call: Call, point: torch.Tensor) -> torch.Tensor:
    """F at `point`."""
    full = _run(module, call, point)
    with quantized():
        rounded = _run(module, call, point)
    return (full - rounded).abs().mean(-1).flatten().sum()


def _run(module: torch.nn.Module, call: Call, point: torch.Tensor) -> torch.Tensor:
    """The module's output [B, T, H] with another input in the call."""
    args, kwargs = call
    out = module(point, *args[1:], **kwargs) if args else module(**kwargs | {"hidden_states": point})
    return hidden_of(out)
