"""The kernels' twin in plain torch: what their tests compare with, and what runs on a CPU.

It widens the whole weight to float32 in every call. Any device, float32 sums, no Triton.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.functional import pad

from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.kernels.expert_weights import ExpertWeights
from vlmq_vllm.kernels.layout import FIELDS, PLANES, STRIPE, Geometry, RuntimeWeight


def places(bits: int, field: int) -> Iterator[tuple[int, int, int, int]]:
    """Where a field's codes lie, in pieces: (plane, lowest bit in the word, lowest bit in the code, number of bits)."""
    if bits == 3 and field == 15:
        yield from ((plane, 15, plane, 1) for plane in range(3))
    elif bits == 3:
        yield field // 5, 3 * (field % 5), 0, 3
    else:
        yield 0, bits * field, 0, bits


def to_words(codes: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Words int16 [stripes, spans, P * W, 64] of codes [rows, columns] uint8."""
    below, right = geometry.stripes * STRIPE - len(codes), geometry.spans * geometry.span - codes.shape[1]
    blocks = pad(codes, (0, right, 0, below)).view(-1, STRIPE, geometry.spans, FIELDS[geometry.bits], geometry.slice)
    blocks = blocks.permute(3, 0, 2, 4, 1).to(torch.int32)  # [fields, stripes, spans, W, 64]
    planes = [torch.zeros_like(blocks[0]) for _ in range(PLANES[geometry.bits])]
    for field, block in enumerate(blocks):
        for plane, place, low, count in places(geometry.bits, field):
            planes[plane] |= (block >> low & (1 << count) - 1) << place
    return torch.cat(planes, dim=2).to(torch.int16)


def from_words(words: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Codes [rows, columns] uint8 of words int16 [stripes, spans, P * W, 64]."""
    planes = words.to(torch.int32).split(geometry.slice, dim=2)
    fields = []
    for field in range(FIELDS[geometry.bits]):
        codes = torch.zeros_like(planes[0])
        for plane, place, low, count in places(geometry.bits, field):
            codes |= (planes[plane] >> place & (1 << count) - 1) << low
        fields.append(codes.to(torch.uint8))
    codes = torch.stack(fields, dim=2)  # [stripes, spans, fields, W, 64]
    return codes.permute(0, 4, 1, 2, 3).reshape(-1, geometry.spans * geometry.span)[: geometry.rows, : geometry.columns]


def dequantize(weight: RuntimeWeight) -> torch.Tensor:
    """The weight [N, K] in float32."""
    geometry = weight.geometry
    scale = weight.scales.T[: geometry.rows]
    zero = None if weight.zeros is None else weight.zeros.T[: geometry.rows]
    format = replace(geometry.format, group_size=geometry.group)
    return QuantizedWeight(format, from_words(weight.packed, geometry), scale, zero).dequantize()


def gemm(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None = None,
    token_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias: [..., N] in x's dtype from x [..., K] and bias [N]; summed in float32, rounded once.

    `token_scales` [..., 1] float32 multiplies x W^T.
    """
    weight.check_input(x, bias)
    out = x.float() @ dequantize(weight).T
    if token_scales is not None:
        out *= token_scales
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def experts(
    x: torch.Tensor,
    weights: ExpertWeights,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    router: torch.Tensor | None = None,
) -> torch.Tensor:
    """router * (x W[ids]^T + bias[ids]): [T, E, N] from x [T, K] or [T, E, K], ids and router [T, E]."""
    weights.check_input(x, ids, bias, router)
    inputs = (x if x.ndim == 3 else x[:, None]).expand(*ids.shape, -1).float()
    out = torch.zeros(*ids.shape, weights.geometry.rows, device=x.device)
    for expert in ids.unique().tolist():
        if 0 <= expert < len(weights):
            product = inputs[ids == expert] @ dequantize(weights[expert]).T
            out[ids == expert] = product if bias is None else product + bias[expert].float()
    return (out if router is None else out * router[..., None].float()).to(x.dtype)
