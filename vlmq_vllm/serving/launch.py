"""Runs a loaded linear layer as a list of launches, each a matrix product that gives a slice of the layer's outputs.

    triton  neighbouring segments through `kernels/`              tensors packed0, scales0, zeros0, packed1, ...
    int4    neighbouring segments widened for vLLM's CPU kernel   tensors packed, scales, zeros (`cpu.py`)
    dense   a weight at 16 bits, kept so or dequantised once      tensor weight

Where a checkpoint rounds inputs to 8 bits (`activations.py`) a launch with quantised weights takes the integers and
every token's scale; a weight that the checkpoint keeps at 16 bits takes the input as it is.

The caller keeps the tensors; a Launch itself holds numbers and their names only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby

import torch
from vllm.logger import init_logger

from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.kernels import torch_ops  # noqa: F401, defines torch.ops.vlmq
from vlmq_vllm.kernels.layout import RuntimeWeight, why_not
from vlmq_vllm.serving import cpu
from vlmq_vllm.serving.compat import batch_invariant

logger = init_logger(f"vllm.{__name__}")

Tensors = Mapping[str, torch.Tensor]
# Integers are multiplied as parts of 128, exactly the same to a float: float16 could not hold many of the sums.
UNIT = 2.0**-7


@dataclass(frozen=True)
class Piece:
    """A segment after loading: checkpoint name, format (None: a dense `weight`) and its tensors by part name."""

    name: str
    format: WeightFormat | None
    tensors: Tensors

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.tensors["weight"].shape if self.format is None else self.tensors["weight_shape"].tolist()
        rows, columns = shape
        return rows, columns

    def codes(self) -> QuantizedWeight:
        assert self.format is not None
        return QuantizedWeight.from_tensors(self.format, self.tensors)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.tensors["weight"].clone() if self.format is None else self.codes().dequantize(dtype)


@dataclass(frozen=True)
class Launch:
    """One product of `rows` outputs, of every expert for a mixture, from the tensors `names`; `rounded`: its inputs are
    integers with tokens' scales.

    `isa` belongs to "int4". To "triton" belong `columns` and `weights`, (bits, group_size, rows) of each.
    """

    kind: str
    rows: int
    names: tuple[str, ...]
    isa: str = ""
    weights: tuple[tuple[int, int, int], ...] = ()
    columns: int = 0
    batch_invariant: bool = False
    rounded: bool = False

    def run(
        self, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None, token_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [M, columns] times the weights, times token_scales [M, 1] float32 if given, plus bias [rows]: [M, rows]."""
        if self.kind == "triton":
            count = range(len(self.weights))
            lists = [[tensors.get(f"{name}{i}") for i in count] for name in ("packed", "scales", "zeros")]
            bits, group_sizes, rows = (list(numbers) for numbers in zip(*self.weights, strict=True))
            given = (*lists, bias, bits, group_sizes, rows, self.columns, self.batch_invariant)
            if token_scales is None:
                return torch.ops.vlmq.linear_v1(x, *given)
            return torch.ops.vlmq.linear_int8_v1(x, token_scales, *given)
        if token_scales is None:
            return self._float(tensors, x, bias)
        product = self._float(tensors, x * UNIT, None).float() * (token_scales / UNIT)
        return (product if bias is None else product + bias).to(x.dtype)

    def _float(self, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.kind == "dense":
            return torch.nn.functional.linear(x, tensors["weight"], bias)
        packed, scales, zeros = tensors["packed"], tensors["scales"], tensors.get("zeros")
        return cpu.int4_linear(x, packed, scales, zeros, bias, self.rows, self.isa)


def prepare(
    pieces: list[Piece], dtype: torch.dtype, with_bias: bool, rounded: bool = False
) -> list[tuple[Launch, Tensors]]:
    """The launches of a layer and their tensors for activations of `dtype`, at 8 bits if `rounded`."""
    launches: list[tuple[Launch, Tensors]] = []
    for kind, group in groupby(pieces, key=lambda piece: kind_of(piece, dtype)):
        members = list(group)
        if kind == "triton":
            launches.append(_triton(members, dtype, with_bias, rounded))
        elif kind == "int4":
            tensors = cpu.widen([piece.codes() for piece in members], dtype)
            rows = sum(piece.shape[0] for piece in members)
            launches.append((Launch(kind, rows, tuple(tensors), isa=cpu.isa(dtype), rounded=rounded), tensors))
        else:
            for piece in members:
                launch = Launch(kind, piece.shape[0], ("weight",), rounded=rounded and piece.format is not None)
                launches.append((launch, {"weight": piece.dense(dtype)}))
    return launches


def kind_of(piece: Piece, dtype: torch.dtype) -> str:
    """How the piece is launched; says so in the log where it has to be dequantised."""
    kind, reason = choose(piece, dtype)
    if reason is not None:
        logger.warning_once("Weights are dequantised to %s at load and take its full memory: %s", dtype, reason)
        logger.debug("%s is dequantised at load: %s", piece.name, reason)
    return kind


def choose(piece: Piece, dtype: torch.dtype) -> tuple[str, str | None]:
    """The kind, and why it is "dense" where the piece is quantised."""
    if piece.format is None:
        return "dense", None
    on_cpu = piece.device.type == "cpu"
    reason = cpu.why_not_int4(piece.format, dtype) if on_cpu else why_not(piece.format, *piece.shape)
    if reason is not None:
        return "dense", reason
    return ("int4" if on_cpu else "triton"), None


def repacked(pieces: list[Piece]) -> RuntimeWeight:
    """Pieces of one format as one weight of the kernels. Raises RuntimeError where Triton is missing."""
    if find_spec("triton") is None:
        raise RuntimeError("vlmq's kernels need Triton, which is not installed; pip install triton")
    from vlmq_vllm.kernels.repack import repack

    assert pieces[0].format is not None, "kernels are for quantised weights"
    return repack(pieces[0].format, [piece.tensors for piece in pieces])


def _triton(pieces: list[Piece], dtype: torch.dtype, with_bias: bool, rounded: bool) -> tuple[Launch, Tensors]:
    weights = [repacked(list(members)) for _, members in groupby(pieces, key=lambda piece: piece.format)]
    invariant = batch_invariant()
    if weights[0].packed.is_cuda:
        from vlmq_vllm.kernels.warmup import warm

        warm(weights, dtype, with_bias, invariant, rounded)
    tensors: dict[str, torch.Tensor] = {}
    for i, weight in enumerate(weights):
        tensors |= {f"packed{i}": weight.packed, f"scales{i}": weight.scales}
        if weight.zeros is not None:
            tensors[f"zeros{i}"] = weight.zeros
    shapes = [weight.geometry for weight in weights]
    launch = Launch(
        "triton",
        sum(shape.rows for shape in shapes),
        tuple(tensors),
        weights=tuple((shape.bits, shape.format.group_size, shape.rows) for shape in shapes),
        columns=shapes[0].columns,
        batch_invariant=invariant,
        rounded=rounded,
    )
    return launch, tensors
