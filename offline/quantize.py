"""The walk: catch the decoder's inputs, then for each layer weigh tokens, collect moments, solve, write, go on.

Two streams run through the decoder, U behind the quantised layers and F behind the full-precision ones. Within a layer
the groups of linears are quantised in the order of the forward pass, and each group's moments are collected after the
groups before it have been replaced. One decoder layer's weights are in memory at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

import torch

import vlmq_vllm
from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.samples import load_processor, model_inputs, read_chats
from vlmq_vllm.offline.gptq import Moments, Solution, round_to_nearest, solve
from vlmq_vllm.offline.progress import Progress
from vlmq_vllm.offline.saliency import gradient_norms, token_weights
from vlmq_vllm.offline.settings import Settings
from vlmq_vllm.offline.source import Source, find
from vlmq_vllm.offline.stream import Stream, capture, check_replay, run, visit_inputs
from vlmq_vllm.offline.writer import Writer, check_destination

SHARD = 4 << 30  # bytes of unquantised tensors per file
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


@dataclass(frozen=True)
class Row:
    """A linear in the report: `loss`, `damp` and `dead` as in gptq.Solution (None and 0 for method "rtn").

    tokens: "saliency" where tokens were weighted, "no signal" where they should have been but all gradients are zero
    or some not finite (as in the first layer, where both streams are equal), "equal" elsewhere.
    """

    module: str
    loss: float | None
    damp: float | None
    dead: int
    tokens: str


def quantize(
    model: str, out: Path, data: Path | None, settings: Settings, device: str = "cpu", progress: Progress | None = None
) -> list[Row]:
    """Quantise the decoder linears of `model` (a folder or hub name) into the new folder `out`.

    `data` is a JSONL file of chats with images (`samples.py`); only method "rtn" goes without. Raises QuantizeError or
    CheckpointError, with nothing left behind.
    """
    began, progress = monotonic(), progress or Progress()
    check_destination(out)
    place = _device(device)
    chats = _chats(data, settings)
    source = Source(find(model))
    with Writer(out, _expected_bytes(source, settings)) as writer:
        walk = _Walk(source, settings, place)
        if chats:
            walk.begin(chats, progress)
        rows: list[Row] = []
        for i in progress.track(range(len(source.layers())), "quantising"):
            tensors, found = walk.layer(i)
            writer.add(tensors)
            progress.layer(i, found, settings.damp)
            rows += found
        for tensors in _untouched(source, {row.module for row in rows}):
            writer.add(tensors)
        tool = {"name": "vlmq-vllm", "version": vlmq_vllm.__version__, "settings": settings.to_dict()}
        config = QuantizationSpec(settings.format, {}).to_dict(tool)
        report = {"seconds": round(monotonic() - began, 1), "modules": [asdict(row) for row in rows]}
        writer.finish(source.folder, source.config | {"quantization_config": config}, report)
    return rows


def _device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QuantizeError(
            f"device {name!r} cannot be used ({reason}); choose cpu, or cuda where there is a GPU"
        ) from None


def _chats(data: Path | None, settings: Settings) -> list[dict]:
    """The calibration chats in the order that the seed decides; none for method "rtn"."""
    if settings.method == "rtn":
        return []
    if data is None:
        raise QuantizeError(f"method {settings.method!r} needs calibration data; give --data FILE.jsonl")
    return read_chats(data, settings.seed)


class _Walk:
    """The two streams on their way through the decoder; both are empty for method "rtn"."""

    def __init__(self, source: Source, settings: Settings, device: torch.device) -> None:
        self.source, self.settings, self.device = source, settings, device
        self.streams: list[Stream] = []  # U, and the arguments that U and F share
        self.full: list[torch.Tensor] = []  # F

    def begin(self, chats: list[dict], progress: Progress) -> None:
        """Prepare the calibration samples and put both streams in front of the first layer."""
        processor = load_processor(self.source.folder)
        inputs = list(model_inputs(chats, processor, self.settings.samples, self.settings.max_tokens))
        progress.samples(len(inputs), self.settings.samples, sum(sample["input_ids"].shape[1] for sample in inputs))
        check_replay(self.source, next(sample for sample in inputs if "pixel_values" in sample), self.device)
        self.streams = capture(self.source, inputs, self.device)
        if self.settings.method == "vlmq":
            self.full = [stream.hidden for stream in self.streams]

    @torch.no_grad()
    def layer(self, index: int) -> tuple[dict[str, torch.Tensor], list[Row]]:
        """Quantise one layer: its tensors by their names in the checkpoint, and its part of the report."""
        name = f"{self.source.family.layers}.{index}"
        layer = self.source.materialise(name, self.device, torch.float32)
        weights = self._weigh(layer)
        tensors: dict[str, torch.Tensor] = {}
        rows = []
        for group in self.source.family.groups:
            moments = self._moments(layer, group, weights)
            for linear in group:
                module = self.source.file_name[f"{name}.{linear}.weight"].removesuffix(".weight")
                solution = self._solve(layer.get_submodule(linear), module, moments.get(linear))
                tensors |= {f"{module}.{part}": tensor for part, tensor in solution.weight.tensors().items()}
                rows.append(Row(module, solution.loss, solution.damp, solution.dead, self._tokens(linear, weights)))
        for stream in self.streams:
            stream.hidden = run(layer, stream)
        self.source.release(name)
        return tensors, rows

    def _tokens(self, linear: str, weights: dict) -> str:
        if linear in weights:
            return "saliency"
        return "no signal" if self.full and linear in self.source.family.weighted else "equal"

    def _weigh(self, layer: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
        """Token weights [T] per sample for each weighted linear with a signal; F moves behind the layer."""
        norms: dict[str, list[torch.Tensor]] = {}
        for i, full in enumerate(self.full):
            stream = self.streams[i]
            for linear, g in gradient_norms(layer, self.source.family, full, stream.hidden, stream.kwargs).items():
                norms.setdefault(linear, []).append(g)
            self.full[i] = run(layer, Stream(full, stream.kwargs))
        weights = {linear: token_weights(g, self.settings.saliency_power) for linear, g in norms.items()}
        return {linear: found for linear, found in weights.items() if found is not None}

    def _moments(self, layer: torch.nn.Module, group: tuple[str, ...], weights: dict) -> dict[str, Moments]:
        """Second moments of each linear of the group; those without token weights share one."""
        if not self.streams:
            return {}
        columns = layer.get_submodule(group[0]).in_features
        shared = Moments(columns, self.device)
        moments = {linear: Moments(columns, self.device) if linear in weights else shared for linear in group}
        for i, stream in enumerate(self.streams):
            counted: set[int] = set()

            def visit(linear: str, inputs: torch.Tensor, i: int = i, counted: set[int] = counted) -> None:
                if id(moments[linear]) not in counted:
                    counted.add(id(moments[linear]))
                    moments[linear].add(inputs, weights[linear][i] if linear in weights else None)

            visit_inputs(layer, group, stream, visit)
        return moments

    def _solve(self, linear: torch.nn.Linear, module: str, moments: Moments | None) -> Solution:
        """Quantise one linear and put the result in its place, rounded as it will be served."""
        stored = self.source.stored_dtype(f"{module}.weight")
        options = self.settings
        search = options.grid == "mse"
        if moments is None:
            rounded = round_to_nearest(linear.weight, options.format, stored, search)
            solution = Solution(rounded, None, None, 0)
        else:
            solution = solve(
                linear.weight,
                moments.mean(),
                options.format,
                stored,
                search=search,
                act_order=options.act_order == "static",
                damp=options.damp,
            )
        linear.weight.copy_(solution.weight.dequantize(stored))
        return solution


def _untouched(source: Source, quantized: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Every other tensor of the source as it is, in files of about SHARD bytes."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name in sorted(source.headers):
        if name.removesuffix(".weight") not in quantized:
            batch[name] = source.read(name)
            size += batch[name].nbytes
            if size > SHARD:
                yield batch
                batch, size = {}, 0
    if batch:
        yield batch


def _expected_bytes(source: Source, settings: Settings) -> int:
    """Size of the checkpoint's weights on disk."""
    linears = [f"{source.family.layers}.{{}}.{linear}.weight" for group in source.family.groups for linear in group]
    names = {source.file_name[n.format(i)] for i in range(len(source.layers())) for n in linears}
    total = 0.0
    for name, info in source.headers.items():
        bits = settings.format.bits_per_weight(*info.shape) if name in names else 8 * BYTES.get(info.dtype, 1)
        total += math.prod(info.shape) * bits / 8
    return math.ceil(total)
