"""Runs a loaded mixture of experts: one product for gate and up, one for down, each for all experts of a rank.

    triton  the grouped kernel of `kernels/`                         tensors packed, scales, zeros  [E, ...]
    int4    expert by expert through vLLM's CPU kernel (`cpu.py`)    tensors packed, scales, zeros  [E, ...]
    dense   expert by expert, dequantised once                       tensor weight [E, N, K]

The caller keeps the tensors. The last two are one operator, `vlmq::experts_on_cpu_v1`: which experts have tokens is not
known when vLLM compiles a model.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, linear, silu

from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.torch_ops import define
from vlmq_vllm.serving import cpu
from vlmq_vllm.serving.launch import Launch, Piece, Tensors, choose, kind_of, repacked

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


def run(
    launch: Launch, tensors: Tensors, x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor | None
) -> torch.Tensor:
    """Every token with its experts: x [T, columns] or [T, k, columns], ids [T, k] (-1: not here, gives zeros),
    router [T, k] as a factor or None: [T, k, rows]."""
    if launch.kind == "triton":
        packed = (tensors["packed"], tensors["scales"], tensors.get("zeros"))
        return torch.ops.vlmq.experts_v1(x, *packed, ids, None, router, *launch.weights[0], launch.columns)
    parts = [tensors.get(name) for name in ("weight", "packed", "scales", "zeros")]
    out = torch.ops.vlmq.experts_on_cpu_v1(x, *parts, ids, launch.rows, launch.isa)
    return out if router is None else (out.float() * router.unsqueeze(-1)).to(x.dtype)


def prepare(
    pieces: list[Piece], each: int, dtype: torch.dtype, experts_per_token: int, with_router: bool
) -> tuple[Launch, Tensors]:
    """The launch and its tensors for activations of `dtype`; `each` pieces that follow one another are an expert.

    Raises ValueError off the CPU for what the kernels cannot read: experts one by one would wait for the GPU.
    """
    _, reason = choose(pieces[0], dtype)
    if reason and pieces[0].device.type != "cpu":
        raise ValueError(f"{pieces[0].name} cannot be served on this device: {reason}")
    experts = [pieces[i : i + each] for i in range(0, len(pieces), each)]
    kind = kind_of(pieces[0], dtype)
    if kind == "triton":
        return _triton(experts, dtype, experts_per_token, with_router)
    if kind == "int4":
        one_by_one = [cpu.widen([piece.codes() for piece in expert], dtype) for expert in experts]
    else:
        one_by_one = [{"weight": torch.cat([piece.dense(dtype) for piece in expert])} for expert in experts]
    tensors = {name: torch.stack([tensors[name] for tensors in one_by_one]) for name in one_by_one[0]}
    rows, isa = sum(piece.shape[0] for piece in experts[0]), cpu.isa(dtype) if kind == "int4" else ""
    return Launch(kind, rows, tuple(tensors), isa), tensors


def _triton(
    experts: list[list[Piece]], dtype: torch.dtype, experts_per_token: int, with_router: bool
) -> tuple[Launch, Tensors]:
    stacked = ExpertWeights.stack(map(repacked, experts), len(experts))
    if stacked.packed.is_cuda:
        from vlmq_vllm.kernels.warmup import warm_experts

        warm_experts(stacked, experts_per_token, dtype, with_router)
    tensors = {"packed": stacked.packed, "scales": stacked.scales}
    if stacked.zeros is not None:
        tensors["zeros"] = stacked.zeros
    shape = stacked.geometry
    weights = ((shape.bits, shape.format.group_size, shape.rows),)
    return Launch("triton", shape.rows, tuple(tensors), weights=weights, columns=shape.columns), tensors


def experts_on_cpu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    packed: torch.Tensor | None,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    ids: torch.Tensor,
    rows: int,
    isa: str,
) -> torch.Tensor:
    """Expert by expert, the tokens that are routed to it: [T, k, rows]."""
    out = x.new_zeros((*ids.shape, rows))
    held = packed if weight is None else weight
    assert held is not None
    for expert in ids.unique().tolist():
        if not 0 <= expert < len(held):
            continue
        token, slot = torch.where(ids == expert)
        own = x[token] if x.ndim == 2 else x[token, slot]
        if weight is not None:
            out[token, slot] = linear(own, weight[expert])
        else:
            assert scales is not None
            zero = None if zeros is None else zeros[expert]
            out[token, slot] = cpu.int4_linear(own, held[expert], scales[expert], zero, None, rows, isa)
    return out


define(
    "experts_on_cpu_v1",
    "(Tensor x, Tensor? weight, Tensor? packed, Tensor? scales, Tensor? zeros, Tensor ids, int rows, str isa) "
    "-> Tensor",
    lambda x, weight, packed, scales, zeros, ids, rows, isa: x.new_empty((*ids.shape, rows)),
    cpu=experts_on_cpu,
)
