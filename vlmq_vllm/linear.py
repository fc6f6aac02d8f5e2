"""The linear method of vlmq: how a vLLM layer receives, checks and applies its quantised weights.

While weights arrive, all segments of a layer (`segments.py`) lie one behind the other in flat parameters that bear the
names of the checkpoint's tensors, one element order per name, so that vLLM's loaders find them and shards may differ
in width:

    weight_packed [words]  weight_scale [groups]  weight_zero_point [words]  weight_shape [2 per segment]
    weight [values], only when a shard of a fused layer stays at 16 bits

After loading they are turned into what the launches (`launch.py`) read, parameters `vlmq_<launch>_<tensor>`; only an
empty weight_packed remains. vLLM's reload restores the flat parameters and goes the same way again. ParallelLMHead has
the attributes of a linear layer and is served by the same method; vocabulary rows that vLLM adds evaluate to zero.
"""

import math
from types import MethodType

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.format import PARTS
from vlmq_vllm.launch import Piece, prepare
from vlmq_vllm.segments import DENSE, Segment, plan

QKV = {"q": 0, "k": 1, "v": 2}


class VLMQLinearMethod(LinearMethodBase):
    """Serves one layer; `shards` are its checkpoint modules with their formats, None for one kept at 16 bits.

    `config` (a VLMQConfig) is told when a layer has been loaded.
    """

    def __init__(self, shards: list[tuple[str, ModuleInfo | None]], config) -> None:
        self.shards = shards
        self.config = config

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        layer.vlmq_segments = plan(layer, self.shards, input_size_per_partition, output_partition_sizes)
        layer.vlmq_dtype = params_dtype
        layer.vlmq_arrived = set()
        layer.vlmq_dummy = _is_dummy_load()
        dtypes = {"weight_scale": params_dtype, DENSE: params_dtype, "weight_shape": torch.int64}
        for part in (*PARTS, DENSE):
            size = sum(_sizes(layer, part))
            if size:
                _register(layer, part, torch.zeros(size, dtype=dtypes.get(part, torch.int32)))
                layer._parameters[part].vlmq_part = part
                layer._parameters[part].weight_loader = MethodType(vlmq_weight_loader, layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not layer.weight_packed.numel():
            return
        self.config.check_complete()
        if not layer.vlmq_dummy:
            _check_arrived(layer)
        pieces = [_piece(layer, i) for i in range(len(layer.vlmq_segments))]
        with_bias = getattr(layer, "bias", None) is not None
        launches = prepare(pieces, layer.vlmq_dtype, with_bias)
        _register(layer, "weight_packed", layer.weight_packed.new_empty(0))
        for part in (*PARTS[1:], DENSE):
            layer._parameters.pop(part, None)
        for i, (_, tensors) in enumerate(launches):
            for name, tensor in tensors.items():
                _register(layer, f"vlmq_{i}_{name}", tensor)
        layer.vlmq_launches = tuple(launch for launch, _ in launches)
        layer.vlmq_arrived.clear()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., I] to [..., O]."""
        flat = x.reshape(-1, x.shape[-1])
        outputs, start = [], 0
        for i, launch in enumerate(layer.vlmq_launches):
            tensors = {name: getattr(layer, f"vlmq_{i}_{name}") for name in launch.names}
            stop = start + launch.rows
            outputs.append(launch.run(tensors, flat, None if bias is None else bias[start:stop]))
            start = stop
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return out.reshape(*x.shape[:-1], start)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module):
        raise ValueError(
            f"{self.shards[0][0]} is quantised, but config.json ties it to the input embeddings "
            "(tie_word_embeddings true); set it to false, or quantise without the head"
        )


def vlmq_weight_loader(
    layer: torch.nn.Module,
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    loaded_shard_id: str | int | None = None,
) -> None:
    """Copy this rank's piece of one tensor into its place in the flat parameter.

    Bound to its layer as a method: vLLM's reload reads the loader's name and signature and swaps its layer. It first
    calls the loader with a parameter on the meta device and counts copied elements, to know when a layer is complete;
    cutting may copy too and must not be counted.
    """
    part, index = param.vlmq_part, _segment_index(layer, loaded_shard_id)
    place = _view(layer, param, index, part)
    place.copy_(place if place.is_meta else layer.vlmq_segments[index].cut(part, loaded_weight))
    layer.vlmq_arrived.add((index, part))


def _segment_index(layer: torch.nn.Module, shard: str | int | None) -> int:
    count = len(layer.vlmq_segments)
    if shard is None and count == 1:
        return 0
    index = QKV.get(shard, shard)
    if count > 1 and isinstance(index, int) and 0 <= index < count:
        return index
    names = ", ".join(segment.name for segment in layer.vlmq_segments)
    raise ValueError(
        f"{layer.prefix}: vLLM loads shard {shard!r} of a layer that the checkpoint stores as {names}; "
        "vlmq cannot split or join these, quantise without this layer"
    )


def _sizes(layer: torch.nn.Module, part: str) -> list[int]:
    """Number of elements of every segment's tensor, 0 where a segment has none of this name."""
    return [math.prod(segment.shapes().get(part, (0,))) for segment in layer.vlmq_segments]


def _view(layer: torch.nn.Module, param: torch.Tensor, index: int, part: str) -> torch.Tensor:
    """The place of a segment's tensor in its flat parameter."""
    sizes = _sizes(layer, part)
    start = sum(sizes[:index])
    return param.data[start : start + sizes[index]].view(layer.vlmq_segments[index].shapes()[part])


def _check_arrived(layer: torch.nn.Module) -> None:
    for i, segment in enumerate(layer.vlmq_segments):
        for part in segment.shapes():
            if (i, part) not in layer.vlmq_arrived:
                raise ValueError(
                    f"{segment.name}.{part} never arrived ({layer.prefix}); the checkpoint lacks it or vLLM's "
                    "loader of this model skips it; copy the checkpoint again, or quantise without this layer"
                )


def _piece(layer: torch.nn.Module, index: int) -> Piece:
    segment: Segment = layer.vlmq_segments[index]
    tensors = {part: _view(layer, getattr(layer, part), index, part) for part in segment.shapes()}
    values = DENSE if segment.format is None else "weight_scale"
    if not torch.isfinite(tensors[values]).all():
        raise ValueError(
            f"{segment.name}.{values} holds values that are not finite as {layer.vlmq_dtype}; serve with another "
            "--dtype if the checkpoint was made in one of wider range, else quantise anew"
        )
    if segment.format is None:
        return Piece(segment.name, None, tensors)
    tensors["weight_shape"] = torch.tensor(segment.shape)  # what arrived is the shape before it was cut
    return Piece(segment.name, segment.format, tensors)


def _register(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def _is_dummy_load() -> bool:
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"
