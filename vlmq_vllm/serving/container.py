"""Holds a layer's tensors while vLLM loads them, and checks that all have arrived.

While weights arrive, all segments of a layer (`segments.py`) lie one after the other in flat parameters that bear the
names of the checkpoint's tensors, one element order per name, so that vLLM's loaders find them and shards may differ
in width. In a checkpoint of our own, with a prefix for experts:

    weight_packed [words]  weight_scale [groups]  weight_zero_point [words]  weight_shape [2 per segment]
    weight [values], only when a shard of a fused layer stays at 16 bits

After loading only an empty weight_packed remains, by which vLLM finds the layer's device. vLLM's reload restores the
flat parameters and goes the same way again.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vlmq_vllm.format import PARTS
from vlmq_vllm.serving.launch import Piece
from vlmq_vllm.serving.segments import DENSE, Layer, Segment

logger = init_logger(f"vllm.{__name__}")
Flat = Any  # a torch.nn.Parameter with what `Container.register` gives it


class Container:
    """The flat parameters of `segments` for activations of `dtype`; their names begin with `prefix`."""

    def __init__(self, segments: list[Segment], dtype: torch.dtype, prefix: str = "") -> None:
        self.segments = segments
        self.dtype = dtype
        self.prefix = prefix
        self.arrived: set[tuple[int, str]] = set()
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"
        self.parts = {name: part for segment in segments for name, part in segment.parts().items()}
        self.first = next(name for name, part in self.parts.items() if part == PARTS[0])
        sizes = {name: [math.prod(_shape(segment, name)) for segment in segments] for name in self.parts}
        self.offsets = {name: [0, *accumulate(found)] for name, found in sizes.items()}

    def register(self, layer: Layer, loader: Callable) -> None:
        """Give `layer` the parameters, each with `loader` as its weight_loader.

        It is bound to the layer as a method: vLLM's reload reads a loader's name and signature and swaps its layer.
        """
        for name, part in self.parts.items():
            floating = part in ("weight_scale", DENSE)
            dtype = self.dtype if floating else torch.int64 if part == "weight_shape" else torch.int32
            param: Flat = add_parameter(layer, self.prefix + name, torch.zeros(self.offsets[name][-1], dtype=dtype))
            param.vlmq_name = name
            param.vlmq_prefix = self.prefix
            param.weight_loader = MethodType(loader, layer)

    def load(self, param: Flat, index: int, tensor: torch.Tensor) -> None:
        """Copy this rank's piece of a tensor of segment `index` into its place in the flat parameter.

        vLLM's reload first calls with a parameter on the meta device and counts copied elements, to know when a layer
        is complete; cutting may copy too and must not be counted. Raises ValueError for a tensor that is not expected.
        """
        name, place = param.vlmq_name, self._view(param, index)
        if param.is_meta:
            place.copy_(place)
        else:
            piece = self.segments[index].cut(name, tensor)
            place.copy_(place.new_zeros(1) if piece is None else piece)
            self._check_rounding(index, name, piece, place)
        self.arrived.add((index, name))

    def is_full(self, layer: Layer) -> bool:
        """Whether the parameters are still those of a load."""
        return getattr(layer, self.prefix + self.first).numel() > 0

    def pieces(self, layer: Layer) -> list[Piece]:
        """What has arrived, segment by segment. Raises ValueError for what has not, and for values not finite.

        Dummy weights never arrive; what is loaded into such a model later is checked.
        """
        if self.arrived or not self.dummy:
            self._check_arrived()
        return [self._piece(layer, i) for i in range(len(self.segments))]

    def empty(self, layer: Layer) -> None:
        empty = getattr(layer, self.prefix + self.first).new_empty(0)
        for name in self.parts:
            del layer._parameters[self.prefix + name]
        add_parameter(layer, self.prefix + self.first, empty)
        self.arrived.clear()

    def _view(self, param: Flat, index: int) -> torch.Tensor:
        start, stop = self.offsets[param.vlmq_name][index : index + 2]
        return param.data[start:stop].view(_shape(self.segments[index], param.vlmq_name))

    def _check_arrived(self) -> None:
        for i, segment in enumerate(self.segments):
            for name in segment.parts():
                if (i, name) not in self.arrived:
                    raise ValueError(
                        f"{segment.name}.{name} never arrived; the checkpoint lacks it or vLLM's loader of this model "
                        "skips it; copy the checkpoint again, or quantise without this layer"
                    )

    def _piece(self, layer: Layer, index: int) -> Piece:
        segment = self.segments[index]
        tensors = {}
        for name, part in segment.parts().items():
            if part in segment.shapes():
                tensors[part] = self._view(getattr(layer, self.prefix + name), index)
        values = DENSE if segment.format is None else "weight_scale"
        if not torch.isfinite(tensors[values]).all():
            name = next(name for name, part in segment.parts().items() if part == values)
            raise ValueError(
                f"{segment.name}.{name} holds values that are not finite as {self.dtype}; serve with another --dtype "
                "if the checkpoint was made in one of wider range, else quantise anew"
            )
        if segment.format is not None:
            tensors["weight_shape"] = torch.tensor(segment.shape)  # what arrived is the shape before it was cut
        return Piece(segment.name, segment.format, tensors)

    def _check_rounding(self, index: int, name: str, piece: torch.Tensor | None, place: torch.Tensor) -> None:
        """Say that scales are rounded to the model's dtype; raises ValueError where that makes zeros of them."""
        if self.parts[name] != "weight_scale" or piece is None or piece.dtype == self.dtype:
            return
        logger.warning_once("Scales are stored as %s and rounded to %s at load", piece.dtype, self.dtype)
        if ((piece != 0) & (place == 0).to(piece.device)).any():
            raise ValueError(
                f"{self.segments[index].name}.{name} holds scales that are too small for {self.dtype}; serve with "
                "another --dtype"
            )


def add_parameter(layer: Layer, name: str, tensor: torch.Tensor) -> torch.nn.Parameter:
    param = torch.nn.Parameter(tensor, requires_grad=False)
    layer.register_parameter(name, param)
    return param


def _shape(segment: Segment, name: str) -> tuple[int, ...]:
    """Shape on this rank of what is kept of the tensor `name`: (0,) when the segment has none, (1,) for one that must
    arrive but adds nothing, so that vLLM's reload, which counts elements, awaits it as well."""
    if name not in segment.parts():
        return (0,)
    return segment.shapes().get(segment.parts()[name], (1,))
