"""VLMQMoEMethod: receives, checks and applies the quantised experts of a vLLM layer (RoutedExperts).

Every expert has gate_proj and up_proj [I, H], vLLM's w13, and down_proj [H, I], its w2. They arrive in two containers
(`container.py`), expert by expert, and become the tensors `vlmq_w13_<tensor>` and `vlmq_w2_<tensor>` of
`expert_launch.py`. With tensor parallelism a rank holds a part of I of every expert, with expert parallelism some
experts whole.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.serving.compat import lacks_router, select_experts
from vlmq_vllm.serving.container import Container, Flat, add_parameter
from vlmq_vllm.serving.expert_launch import ACTIVATIONS, prepare, run
from vlmq_vllm.serving.segments import Layer, Segment

if TYPE_CHECKING:
    from vlmq_vllm.serving.config import VLMQConfig

W13, W2 = "w13_", "w2_"
SHARDS = {"w1": 0, "w3": 1, "w2": 0}


class VLMQMoEMethod(FusedMoEMethodBase):
    """Serves one layer; `experts` maps (expert, projection) to checkpoint module and format."""

    def __init__(
        self, moe: Any, prefix: str, experts: dict[tuple[int, str], tuple[str, ModuleInfo]], config: "VLMQConfig"
    ) -> None:
        super().__init__(moe)
        self.prefix = prefix
        self.experts = experts
        self.config = config
        self.routes = lacks_router()

    def create_weights(
        self,
        layer: Layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        names = [getattr(layer, f"ckpt_{part}_proj_name", f"{part}_proj") for part in ("gate", "up", "down")]
        self._check(layer, names)
        here = [e for e in range(layer.global_num_experts) if layer._map_global_expert_id_to_local_expert_id(e) >= 0]
        parallel = self.moe.moe_parallel_config
        inner = intermediate_size_per_partition * parallel.tp_size
        start = intermediate_size_per_partition * parallel.tp_rank
        own, whole = (start, start + intermediate_size_per_partition), (0, hidden_size)  # of I and of H
        *fused, down = names
        segment = partial(Segment, self.prefix, packing=self.config.packing)
        w13 = [segment(*self.experts[e, name], (inner, hidden_size), (own,), whole) for e in here for name in fused]
        w2 = [segment(*self.experts[e, down], (hidden_size, inner), (whole,), own) for e in here]
        layer.vlmq_experts = {W13: Container(w13, params_dtype, W13), W2: Container(w2, params_dtype, W2)}
        for container in layer.vlmq_experts.values():
            container.register(layer, vlmq_expert_loader)

    def process_weights_after_loading(self, layer: Layer) -> None:
        if not layer.vlmq_experts[W13].is_full(layer):
            return
        self.config.check_complete()
        layer.vlmq_launches = {}
        for prefix, each in ((W13, 2), (W2, 1)):
            container: Container = layer.vlmq_experts[prefix]
            launch, tensors = prepare(
                container.pieces(layer), each, container.dtype, self.moe.experts_per_token, with_router=prefix == W2
            )
            container.empty(layer)
            for name, tensor in tensors.items():
                add_parameter(layer, f"vlmq_{prefix}{name}", tensor)
            layer.vlmq_launches[prefix] = launch

    def get_fused_moe_quant_config(self, layer: Layer) -> None:
        """None: vLLM's own kernels for experts are not used."""

    def apply(
        self,
        layer: Layer,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> torch.Tensor:
        """x [T, H] with the experts topk_ids [T, k] times topk_weights [T, k]: [T, H]. vLLM runs shared experts."""
        ids = topk_ids if layer._expert_map is None else layer._expert_map[topk_ids.long()]
        router: torch.Tensor | None = topk_weights
        if layer.apply_router_weight_on_input:
            x, router = x * topk_weights.to(x.dtype), None
        gate, up = self._run(layer, W13, x, ids, None).chunk(2, dim=-1)
        inner = ACTIVATIONS[layer.activation.value](gate) * up
        return self._run(layer, W2, inner, ids, router).sum(dim=1)

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM calls `apply_monolithic` in place of `apply`."""
        return self.routes

    def apply_monolithic(
        self, layer: Layer, x: torch.Tensor, router_logits: torch.Tensor, input_ids: Any = None
    ) -> torch.Tensor:
        """`apply` with the experts that router_logits [T, E] choose."""
        return self.apply(layer, x, *select_experts(layer, x, router_logits))

    def _run(
        self, layer: Layer, prefix: str, x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor | None
    ) -> torch.Tensor:
        launch = layer.vlmq_launches[prefix]
        tensors = {name: getattr(layer, f"vlmq_{prefix}{name}") for name in launch.names}
        return run(launch, tensors, x, ids, router)

    def _check(self, layer: Layer, names: list[str]) -> None:
        """All experts must be there, with one format for all gates and ups and one for all downs."""
        if self.moe.is_lora_enabled:
            raise ValueError(
                f"{self.prefix}: vLLM's LoRA for mixtures of experts needs its own kernels, not for vlmq weights; "
                "serve without --enable-lora, or quantise again without the experts"
            )
        if layer.activation.value not in ACTIVATIONS:
            raise ValueError(
                f"{self.prefix}: experts with the activation {layer.activation.value!r} are not served at low bits "
                f"(served: {', '.join(ACTIVATIONS)}); quantise again without them"
            )
        for group in (names[:2], names[2:]):
            wanted = [(expert, name) for expert in range(self.moe.num_logical_experts) for name in group]
            missing = [key for key in wanted if key not in self.experts]
            if missing:
                expert, name = missing[0]
                raise ValueError(
                    f"{self.prefix}: {name} of expert {expert} is not quantised, others of the layer are; "
                    "quantise all experts of a layer or none"
                )
            first, *others = (self.experts[key] for key in wanted)
            for name, info in others:
                if info.format != first[1].format:
                    raise ValueError(
                        f"{name} is {info.format}, {first[0]} is {first[1].format}; vlmq serves one format for all "
                        f"{' and '.join(group)} of a layer's experts, quantise them alike"
                    )


def vlmq_expert_loader(
    layer: Layer,
    param: Flat,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Put one tensor of one expert into its container; False for an expert of another rank."""
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local >= 0:
        each = 1 if param.vlmq_prefix == W2 else 2
        layer.vlmq_experts[param.vlmq_prefix].load(param, local * each + SHARDS[shard_id], loaded_weight)
    return local >= 0 if return_success else None
