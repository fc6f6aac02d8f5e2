"""What differs between the vLLM releases that are served, 0.26 to 0.33; every other file is written for the newest."""

import inspect
import os
from importlib.util import find_spec
from typing import Any

import torch
from vllm import _custom_ops as ops

from vlmq_vllm.serving.segments import Layer

# What the CPU's 4-bit product takes between zeros and bias: 0.26 an activation order.
ORDER = (None,) if "g_idx" in inspect.signature(ops.cpu_gemm_wna16).parameters else ()


def map_name(mapper: Any, name: str) -> str | None:
    """A tensor name through a WeightsMapper; 0.26 has only the private spelling."""
    return getattr(mapper, "map_name", mapper._map_name)(name)


def complete_head(layer: Layer, prefix: str) -> None:
    """Give a ParallelLMHead what every linear layer knows of itself; 0.26 leaves it out."""
    if not hasattr(layer, "input_size"):
        first = layer.shard_indices.padded_org_vocab_start_index
        layer.prefix, layer.tp_rank = prefix, first * layer.tp_size // layer.org_vocab_size_padded
        layer.input_size, layer.output_size = layer.embedding_dim, layer.num_embeddings_padded


def lacks_router() -> bool:
    """Whether this vLLM leaves the routing of experts to their method: 0.26's build for CPUs does."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and find_spec("vllm.model_executor.layers.fused_moe.cpu_fused_moe") is not None


def select_experts(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """0.26's own routing on a CPU: weights and ids [T, k] for x [T, H] and router logits [T, E]."""
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

    names: tuple[str, ...] = ("top_k", "use_grouped_topk", "renormalize", "topk_group", "num_expert_group")
    names += ("custom_routing_function", "scoring_func", "routed_scaling_factor", "e_score_correction_bias")
    return select_experts(x, logits, **{name: getattr(layer, name) for name in names})


def replaces_experts(layer: Layer) -> bool:
    """Whether a layer of experts answers with constants in place of those that were pruned; before 0.33 none does."""
    if find_spec("vllm.model_executor.layers.fused_moe.expert_substitution") is None:
        return False
    from vllm.model_executor.layers.fused_moe.expert_substitution import SubstitutedRoutedExperts

    return isinstance(layer, SubstitutedRoutedExperts)


def batch_invariant() -> bool:
    """Whether results may not depend on the batch, by the variable that every release reads."""
    return bool(int(os.environ.get("VLLM_BATCH_INVARIANT", "0")))
