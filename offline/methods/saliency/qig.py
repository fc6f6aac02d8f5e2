"""Weighs tokens by integrated gradients of the quantisation error (QIG, 2603.17809, sections 3 and 4).

For the module M that a group of linears feeds (their common parent, or the linear itself), the same module Mq with the
layer's rounded weights, and an input Z1 [B, T, C] of M,

    F(Z)  = sum_t mean_h | M(Z) - Mq(Z) |_th
    IG_tc = (Z1 - Z0)_tc * int_0^1 dF / dZ_tc at Z0 + a (Z1 - Z0) da,        sum_tc IG_tc = F(Z1) - F(Z0)

with the integral as a mean over K midpoints a = (k - 1/2) / K (32 in the paper). Where weights alone are quantised, the
path starts at Z0 = 0. Where activations are too, it goes from the quantised stream's input to the full-precision one's,
and Mq rounds what its linears get; gradients pass through that rounding unchanged. Then, within each sample,

    u_t = mean_c |IG_tc|,   u' = u / sum u,   c = u' within [Q1 - 1.5 IQR, Q3 + 1.5 IQR],   lambda = c / sum c

with the quartiles Q1 and Q3 of u' and IQR = Q3 - Q1, so that a long sample counts no more than a short one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.weigher import Rounded, Weights
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.groups import Group, find_stages, inspected
from vlmq_vllm.offline.model.hooks import InputRounding, rounding_inputs
from vlmq_vllm.offline.model.layers import holding, weights_of
from vlmq_vllm.offline.model.streams import Call, Stream, hidden_of

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


def token_weights(gradients: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N] float32 with sum 1 over each sample's tokens, from IG [N, C] of `samples` of equal length.

    Also [samples] bool, whether a sample has no signal, that is all zero or not finite: its tokens count alike.
    """
    score = gradients.double().abs().mean(-1).view(samples, -1)
    total = score.sum(1, keepdim=True)
    silent = ~(total.isfinite() & (total > 0))
    score = torch.where(silent, 1.0, score) / torch.where(silent, float(score.shape[1]), total)
    low, high = score.quantile(torch.tensor([0.25, 0.75]).to(score), dim=1, keepdim=True)
    reach = 1.5 * (high - low)
    score = score.clamp(low - reach, high + reach)
    return (score / score.sum(1, keepdim=True)).flatten().float(), silent.flatten()


class QIGWeights:
    """Weighs the tokens of every group of a layer; a TokenWeigher. activations: rounds what a linear gets, where it is
    served so. Without a signal (as at the first layer with activations) tokens count alike."""

    def __init__(self, ranks: Ranks, activations: InputRounding | None = None, steps: int = STEPS) -> None:
        self.ranks, self.activations, self.steps = ranks, activations, steps

    def __call__(
        self,
        layer: torch.nn.Module,
        index: int,
        full: list[Stream],
        quantized: list[Stream],
        rounding: Rounded,
    ) -> tuple[Weights, dict[str, str]]:
        """As `weigher.py` says. The list of a group's linears has the mean 1; `full` is needed where activations are
        rounded. Experts are not weighted: which tokens they see changes."""
        originals = weights_of(layer)
        with rounding():
            rounded = {name: weight for name, weight in weights_of(layer).items() if weight is not originals[name]}
        weights: dict[str, list[torch.Tensor]] = {}
        notes: dict[str, str] = {}
        stages = self.ranks.first(find_stages(layer, index, quantized[0]) if quantized else None)
        for group in (group for stage in stages or [] for group in stage):
            if is_expert(group[0]):
                notes |= dict.fromkeys(group, "equal")
                continue
            found = self._group(layer, index, full, quantized, rounded, group)
            notes |= dict.fromkeys(group, "no signal" if found is None else "saliency")
            if found is not None:
                weights |= dict.fromkeys(group, found)
        return weights, notes

    def _group(
        self,
        layer: torch.nn.Module,
        index: int,
        full: list[Stream],
        quantized: list[Stream],
        rounded: dict[str, torch.Tensor],
        group: Group,
    ) -> list[torch.Tensor] | None:
        """The weights of a group's tokens; None where no rank has a sample with a signal. rounded: by linear."""
        name = inspected(group)
        module = layer.get_submodule(name)
        own = {linear: weight for linear, weight in rounded.items() if f"{linear}.".startswith(f"{name}.")}
        if not own:
            return None
        switch = partial(_quantized, layer, own, self.activations)
        # A linear alone is linear along a path from 0: the error's sign does not change, one point is exact.
        alone = isinstance(module, torch.nn.Linear) and self.activations is None
        found, heard = [], 0
        for i, stream in enumerate(quantized):
            call, start = stream.call_of(layer, index, name), None
            if self.activations is not None:
                call, start = full[i].call_of(layer, index, name), input_of(call)
            gradients = integrated_gradients(module, switch, call, start, 1 if alone else self.steps)
            weights, silent = token_weights(gradients, len(stream.hidden))
            found.append(weights)
            heard += int((~silent).sum())
        if not self.ranks.any(heard > 0):
            return None
        sizes = [(len(weights), len(stream.hidden)) for weights, stream in zip(found, quantized, strict=True)]
        device = next(layer.parameters()).device  # that processes exchange tensors on
        tokens, samples = self.ranks.add(torch.tensor(sizes, dtype=torch.float64, device=device).sum(0))
        return [weights * (tokens / samples).float() for weights in found]


@contextmanager
def _quantized(
    layer: torch.nn.Module, linear_weights: dict[str, torch.Tensor], activations: InputRounding | None
) -> Iterator[None]:
    """The layer with other weights of some linears, which also round what they get."""
    linears = [layer.get_submodule(name) for name in linear_weights]
    with holding(layer, linear_weights), rounding_inputs(linears, activations) if activations else nullcontext():
        yield
