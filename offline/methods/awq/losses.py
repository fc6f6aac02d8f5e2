"""Measures what rounded weights under given channel scales cost at the output of the module around them.

For a candidate's scales s [R] the group's linears hold Q(W s) / s, Q rounding to nearest with the values that will be
served, and the loss over all tokens n of all batches is

    sum_n lambda_n err_n / sum_n lambda_n,      err_n = mean_c |e_nc|  or  mean_c e_nc^2,

e [N, d] being the module's output less that with its own weights, on the same inputs. With 8-bit activations the
linears read s round(x / s). Calls of the modules are kept for a chunk of batches, all candidates are tried on it, then
comes the next chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.methods.awq.scalable import Scalable
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.grid import GridSearch
from vlmq_vllm.offline.model.groups import inspected
from vlmq_vllm.offline.model.hooks import InputRounding, removing
from vlmq_vllm.offline.model.layers import holding, linear_of
from vlmq_vllm.offline.model.streams import Stream, hidden_of

BYTES = 1 << 30  # of inputs and outputs of inspected modules that are kept at once, a batch more at most
ERRORS = {"mae": torch.Tensor.abs, "mse": torch.Tensor.square}
ErrorOf = Callable[[torch.Tensor], torch.Tensor]  # of every element, [.., d] to [.., d]


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


@dataclass(frozen=True)
class LinearRounding:
    """How linears are rounded. search: of `round_to_nearest`. format, dtype: of a linear's weight and of its scales.
    inputs: what 8-bit activations do to what a linear reads, or None."""

    search: GridSearch
    format: Callable[[str], WeightFormat]
    dtype: Callable[[str], torch.dtype]
    inputs: InputRounding | None = None


@dataclass(frozen=True)
class _Call:
    """What a module was called with, and its output [.., d] float32."""

    args: tuple
    kwargs: dict
    out: torch.Tensor

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        made = [part for part in (*self.args, *self.kwargs.values(), self.out) if isinstance(part, torch.Tensor)]
        return sum(part.nbytes for part in made)


Chunk = list[tuple[int, dict[str, _Call]]]  # the number of a batch, and calls by module


@torch.no_grad()
def candidate_losses(
    layer: torch.nn.Module, index: int, streams: list[Stream], trials: list[Trial], rounding: LinearRounding, loss: str
) -> torch.Tensor:
    """Sums of lambda err for every trial's candidates and, last, of lambda: [trials, candidates + 1] float64."""
    count = len(trials[0].candidates)
    device = linear_of(layer, trials[0].scalable.linears[0]).weight.device
    sums = torch.zeros(len(trials), count + 1, dtype=torch.float64, device=device)
    for chunk in _chunks(layer, index, streams, {trial.module for trial in trials}):
        for own, trial in zip(sums, trials, strict=True):
            own += _tried(layer, trial, chunk, rounding, ERRORS[loss])
    return sums


def _tried(
    layer: torch.nn.Module, trial: Trial, chunk: Chunk, rounding: LinearRounding, error_of: ErrorOf
) -> torch.Tensor:
    """One trial's row of `candidate_losses` for a chunk, [candidates + 1] float64."""
    kept = [(calls[trial.module], trial.token_weights[i] if trial.token_weights else None) for i, calls in chunk]
    module, sums = layer.get_submodule(trial.module), []
    zero = torch.zeros((), dtype=torch.float64, device=kept[0][0].out.device)
    for scales in trial.candidates:
        with _rounded_under(layer, trial.scalable, scales, rounding):
            sums.append(sum((_error(module, call, lam, error_of) for call, lam in kept), start=zero))
    tokens = [call.out.flatten(0, -2)[:, 0].numel() if lam is None else lam.double().sum() for call, lam in kept]
    return torch.stack([*sums, torch.as_tensor(sum(tokens)).to(sums[0])])


def _error(module: torch.nn.Module, call: _Call, lam: torch.Tensor | None, error_of: ErrorOf) -> torch.Tensor:
    """The sum of lambda err over a call's N tokens, a float64 scalar. lam: lambda [N], None for 1."""
    errors = error_of(hidden_of(module(*call.args, **call.kwargs)) - call.out).flatten(0, -2).mean(-1)
    return (errors if lam is None else errors * lam).sum(dtype=torch.float64)


def _chunks(layer: torch.nn.Module, index: int, streams: list[Stream], modules: set[str]) -> Iterator[Chunk]:
    """The modules' calls, by the numbers of batches, in chunks of bounded size."""
    chunk: Chunk = []
    size = 0
    for i, stream in enumerate(streams):
        calls = _calls(layer, index, stream, modules)
        chunk.append((i, calls))
        size += sum(call.bytes for call in calls.values())
        if size >= BYTES or i + 1 == len(streams):
            yield chunk
            chunk.clear()  # the caller still holds the list
            size = 0


def _calls(layer: torch.nn.Module, index: int, stream: Stream, modules: set[str]) -> dict[str, _Call]:
    """How the layer calls its modules on one batch."""
    calls: dict[str, _Call] = {}

    def noting(name: str) -> RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, out: torch.Tensor | tuple) -> None:
            calls[name] = _Call(args, kwargs, hidden_of(out))

        return layer.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    with removing([noting(name) for name in modules]):
        stream.call(layer, index)
    return calls


@contextmanager
def _rounded_under(
    layer: torch.nn.Module, scalable: Scalable, scales: torch.Tensor, rounding: LinearRounding
) -> Iterator[None]:
    """The group's linears as they would be with these scales [R], for a while."""
    columns = scales[scalable.channel.to(scales.device)]
    held = {}
    for linear in scalable.linears:
        weight, dtype = linear_of(layer, linear).weight, rounding.dtype(linear)
        rounded = round_to_nearest(weight * columns, rounding.format(linear), dtype, rounding.search)
        held[linear] = rounded.served() / columns
    handles = []
    if rounding.inputs:
        handles = [
            layer.get_submodule(linear).register_forward_pre_hook(
                lambda module, inputs: (columns * rounding.inputs(inputs[0] / columns),)
            )
            for linear in scalable.linears
        ]
    with removing(handles), holding(layer, held):
        yield
