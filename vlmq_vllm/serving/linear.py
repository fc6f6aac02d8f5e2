"""VLMQLinearMethod: receives, checks and applies the quantised weights of a linear layer of vLLM.

Tensors arrive in a container (`container.py`) and become what the launches (`launch.py`) read, parameters
`vlmq_<launch>_<tensor>`. ParallelLMHead is served by the same method; vocabulary rows that vLLM adds evaluate to zero.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from vlmq_vllm.activations import quantize_tokens
from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.serving.container import Container, Flat, add_parameter
from vlmq_vllm.serving.launch import prepare
from vlmq_vllm.serving.partition import segments_of
from vlmq_vllm.serving.segments import Layer

if TYPE_CHECKING:
    from vlmq_vllm.serving.config import VLMQConfig

QKV: dict[str, int] = {"q": 0, "k": 1, "v": 2}


class VLMQLinearMethod(LinearMethodBase):
    """Serves one layer; `shards` are its checkpoint modules with their formats, None for one kept at 16 bits."""

    def __init__(self, shards: list[tuple[str, ModuleInfo | None]], config: "VLMQConfig") -> None:
        self.shards = shards
        self.config = config

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        segments = segments_of(
            layer, self.shards, input_size_per_partition, output_partition_sizes, self.config.packing
        )
        layer.vlmq_container = Container(segments, params_dtype)
        layer.vlmq_container.register(layer, vlmq_weight_loader)

    def process_weights_after_loading(self, layer: Layer) -> None:
        container: Container = layer.vlmq_container
        if not container.is_full(layer):
            return
        self.config.check_complete()
        rounded = self.config.activation_bits == 8
        launches = prepare(container.pieces(layer), container.dtype, self._has_bias(layer), rounded)
        container.empty(layer)
        for i, (_, tensors) in enumerate(launches):
            for name, tensor in tensors.items():
                add_parameter(layer, f"vlmq_{i}_{name}", tensor)
        layer.vlmq_launches = tuple(launch for launch, _ in launches)

    def _has_bias(self, layer: Layer) -> bool:
        """Raises ValueError for a bias that vLLM built and nothing filled, and for one that is not finite."""
        bias = getattr(layer, "bias", None)
        if bias is None:
            return False
        names = [name for name, info in self.shards if info is not None]
        if self.config.biased.isdisjoint(names):
            raise ValueError(f"{names[0]}.bias is missing, vLLM builds this layer with one; copy the checkpoint again")
        if not torch.isfinite(bias).all():
            raise ValueError(f"{names[0]}.bias holds values that are not finite as {bias.dtype}; quantise anew")
        return True

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., I] to [..., O]. With inputs of 8 bits a tensor-parallel rank rounds the features that it holds."""
        flat = x.reshape(-1, x.shape[-1])
        rounds = any(launch.rounded for launch in layer.vlmq_launches)
        integers, scales = quantize_tokens(flat) if rounds else (flat, None)
        outputs, start = [], 0
        for i, launch in enumerate(layer.vlmq_launches):
            tensors = {name: getattr(layer, f"vlmq_{i}_{name}") for name in launch.names}
            stop = start + launch.rows
            given, token_scales = (integers, scales) if launch.rounded else (flat, None)
            outputs.append(launch.run(tensors, given, None if bias is None else bias[start:stop], token_scales))
            start = stop
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return out.reshape(*x.shape[:-1], start)

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> None:
        raise ValueError(
            f"{self.shards[0][0]} is quantised, but config.json ties it to the input embeddings "
            "(tie_word_embeddings true); set it to false, or quantise without the head"
        )


def vlmq_weight_loader(
    layer: Layer, param: Flat, loaded_weight: torch.Tensor, loaded_shard_id: str | int | None = None
) -> None:
    """Put one tensor into its container."""
    layer.vlmq_container.load(param, _segment_index(layer, loaded_shard_id), loaded_weight)


def _segment_index(layer: Layer, shard: str | int | None) -> int:
    segments = layer.vlmq_container.segments
    if shard is None and len(segments) == 1:
        return 0
    index = QKV.get(shard) if isinstance(shard, str) else shard
    if len(segments) > 1 and isinstance(index, int) and 0 <= index < len(segments):
        return index
    names = ", ".join(segment.name for segment in segments)
    raise ValueError(
        f"{layer.prefix}: vLLM loads shard {shard!r} of a layer that the checkpoint stores as {names}; "
        "vlmq cannot split or join these, quantise without this layer"
    )
