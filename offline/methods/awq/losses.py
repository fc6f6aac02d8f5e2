"""Measures what rounded weights under given channel scales cost at the output of the module around them.

For a candidate's scales s [R] the group's linears hold Q(W s) / s, Q rounding to nearest with the values that will be
served, and the loss over all tokens n of all batches is

    sum_n lambda_n err_n / sum_n lambda_n,      err_n = mean_c |e_nc|  or  mean_c e_nc^2,

e [N, d] being the module's output less that with its own weights, on the same inputs. With 8-bit activations the
linears read s round(x / s). All candidates are tried on the calls that are kept of a chunk of batches, then the next.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from vlmq_vllm.offline.methods.awq.scalable import Scalable
from vlmq_vllm.offline.model.groups import inspected
from vlmq_vllm.offline.model.hooks import InputRounding, removing
from vlmq_vllm.offline.model.layers import holding, linear_of
from vlmq_vllm.offline.model.streams import Stream, hidden_of, noting

BYTES = 1 << 30  # of inputs and outputs of inspected modules that are kept at once, a batch more at most
ERRORS = {"mae": torch.Tensor.abs, "mse": torch.Tensor.square}
ErrorOf = Callable[[torch.Tensor], torch.Tensor]  # of every element, [.., d] to [.., d]
WeightRounding = Callable[[str, torch.Tensor], torch.Tensor]  # by linear, a weight [O, I] as it will be served
Call = tuple[tuple, dict, torch.Tensor]  # what a module was called with, and its output [.., d] float32
Chunk = list[tuple[int, dict[str, Call]]]  # the number of a batch, and calls by module
Under = Callable[[Scalable, torch.Tensor], AbstractContextManager]  # a group with scales [R], for a while


@dataclass(frozen=True)
class Trial:
    """A group with the scales [R] float32 to be tried; token_weights: [N] per batch, or None for 1."""

    scalable: Scalable
    candidates: list[torch.Tensor]
    token_weights: list[torch.Tensor] | None

    @property
    def module(self) -> str:
        """The module that the group is inspected by."""
        return inspected(self.scalable.linears)


@torch.no_grad()
def candidate_losses(
    layer: torch.nn.Module,
    index: int,
    streams: list[Stream],
    trials: list[Trial],
    rounded: WeightRounding,
    inputs: InputRounding | None,
    loss: str,
) -> torch.Tensor:
    """Sums of lambda err for every trial's candidates and, last, of lambda: [trials, candidates + 1] float64.

    inputs: what 8-bit activations do to what a linear reads, or None. loss: of ERRORS.
    """
    count = len(trials[0].candidates)
    device = linear_of(layer, trials[0].scalable.linears[0]).weight.device
    sums = torch.zeros(len(trials), count + 1, dtype=torch.float64, device=device)
    under = partial(_rounded_under, layer, rounded, inputs)
    for chunk in _chunks(layer, index, streams, {trial.module for trial in trials}):
        for own, trial in zip(sums, trials, strict=True):
            own += _tried(layer, trial, chunk, under, ERRORS[loss])
    return sums


def _tried(layer: torch.nn.Module, trial: Trial, chunk: Chunk, under: Under, error_of: ErrorOf) -> torch.Tensor:
    """One trial's row of `candidate_losses` for a chunk, [candidates + 1] float64."""
    module, kept = layer.get_submodule(trial.module), []
    for i, calls in chunk:
        *_, out = call = calls[trial.module]
        ones = out.new_ones(out.shape[:-1].numel())
        kept.append((call, trial.token_weights[i] if trial.token_weights else ones))
    zero = torch.zeros((), dtype=torch.float64, device=out.device)
    sums = []
    for scales in trial.candidates:
        with under(trial.scalable, scales):
            sums.append(sum((_error(module, call, lam, error_of) for call, lam in kept), start=zero))
    return torch.stack([*sums, sum((lam.sum(dtype=torch.float64) for _, lam in kept), start=zero)])


def _error(module: torch.nn.Module, call: Call, lam: torch.Tensor, error_of: ErrorOf) -> torch.Tensor:
    """The sum of lambda err over a call's N tokens, a float64 scalar. lam: lambda [N]."""
    args, kwargs, out = call
    errors = error_of(hidden_of(module(*args, **kwargs)) - out).flatten(0, -2).mean(-1)
    return (errors * lam).sum(dtype=torch.float64)


def _chunks(layer: torch.nn.Module, index: int, streams: list[Stream], modules: set[str]) -> Iterator[Chunk]:
    """The modules' calls, by the numbers of batches, in chunks of bounded size."""
    chunk: Chunk = []
    size = 0
    for i, stream in enumerate(streams):
        with noting(layer, modules, lambda *call: call) as calls:
            stream.call(layer, index)
        chunk.append((i, calls))
        kept = (part for args, kwargs, out in calls.values() for part in (*args, *kwargs.values(), out))
        size += sum(part.nbytes for part in kept if isinstance(part, torch.Tensor))
        if size >= BYTES or i + 1 == len(streams):
            yield chunk
            chunk.clear()  # the caller still holds the list
            size = 0


@contextmanager
def _rounded_under(
    layer: torch.nn.Module,
    rounded: WeightRounding,
    inputs: InputRounding | None,
    scalable: Scalable,
    scales: torch.Tensor,
) -> Iterator[None]:
    """The group's linears as they would be with these scales [R], for a while."""
    columns = scales[scalable.channel.to(scales.device)]
    weights = {linear: linear_of(layer, linear).weight for linear in scalable.linears}
    handles = []
    if inputs:
        handles = [
            layer.get_submodule(linear).register_forward_pre_hook(
                lambda m, read: (columns * inputs(read[0] / columns),)
            )
            for linear in weights
        ]
    held = {linear: rounded(linear, weight * columns) / columns for linear, weight in weights.items()}
    with removing(handles), holding(layer, held):
        yield
