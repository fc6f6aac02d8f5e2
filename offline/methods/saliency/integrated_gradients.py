"""Computes integrated gradients of the quantisation error along a straight path to a module's input (QIG, 2603.17809).

For a module M, the same module Mq quantised, and an input Z1 [B, T, C] of M,

    F(Z)  = sum_t mean_h | M(Z) - Mq(Z) |_th
    IG_tc = (Z1 - Z0)_tc * int_0^1 dF / dZ_tc at Z0 + a (Z1 - Z0) da,        sum_tc IG_tc = F(Z1) - F(Z0)

with the integral as a mean over K midpoints a = (k - 1/2) / K (32 in the paper). Z0 is zero, or what the caller says.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace

import torch

from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.streams import Stream, hidden_of

STEPS = 32  # K
Call = tuple[tuple, dict]
Switch = Callable[[], AbstractContextManager]


class _Seen(Exception):
    """Ends a layer's run where the module has been called."""


@torch.no_grad()
def call_of(layer: torch.nn.Module, index: int, stream: Stream, module: str) -> Call:
    """(args, kwargs) with which `module` (its name in the layer) is called when the stream runs layer `index`.

    Positions and masks are the model's own. The layer runs no further than that, and the input is as it comes to the
    module: not rounded, even where the stream rounds those of other linears.
    """
    found: list[Call] = []
    asked = layer.get_submodule(module)

    def hook(inner, args, kwargs):
        found.append((args, kwargs))
        raise _Seen

    with suppress(_Seen), removing([asked.register_forward_pre_hook(hook, with_kwargs=True)]):
        replace(stream, rounded=stream.rounded - {asked}).call(layer, index)
    return found[0]


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
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """IG [N, C] float32, signed, for the N = B T tokens of the input of `call` [B, T, C] (or [N, C]).

    quantized: a context manager that makes `module` the quantised one for a while. start: Z0, zero if None.
    valid [N] bool: tokens that count in F; None for all.
    """
    end = input_of(call).detach()
    start = torch.zeros_like(end) if start is None else start.detach()
    total = torch.zeros_like(end)
    for step in range(steps):
        point = torch.lerp(start, end, (step + 0.5) / steps).requires_grad_()
        with torch.enable_grad():
            distance = _distance(module, quantized, call, point, valid)
            total += torch.autograd.grad(distance, point)[0]
    return ((end - start) * total / steps).flatten(0, -2).float()


@torch.no_grad()
def completeness(
    module: torch.nn.Module,
    quantized: Switch,
    call: Call,
    gradients: torch.Tensor,
    start: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> float:
    """sum IG - (F(Z1) - F(Z0)): what the midpoint sum lacks, for IG [N, C] of the same arguments."""
    end = input_of(call)
    start = torch.zeros_like(end) if start is None else start
    ends = (_distance(module, quantized, call, point, valid).double() for point in (end, start))
    return float(gradients.double().sum() - next(ends) + next(ends))


def _distance(module, quantized, call, point, valid) -> torch.Tensor:
    """F at `point`."""
    full = _run(module, call, point)
    with quantized():
        rounded = _run(module, call, point)
    each = (full - rounded).abs().mean(-1).flatten()
    return (each if valid is None else each[valid]).sum()


def _run(module: torch.nn.Module, call: Call, point: torch.Tensor) -> torch.Tensor:
    """The module's output [B, T, H] with another input in the call."""
    args, kwargs = call
    out = module(point, *args[1:], **kwargs) if args else module(**kwargs | {"hidden_states": point})
    return hidden_of(out)
