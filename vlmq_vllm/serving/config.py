"""VLMQConfig, which vLLM asks under `--quantization vlmq` how each of a model's layers is quantised.

The front end reads config.json and the safetensors headers once into a plain table module name -> ModuleInfo, which is
pickled to the workers. There the table alone decides, through the names of `names.py`, and before the first weight is
loaded every module of it must have found its layer.

Errors of the front end are RuntimeErrors: vLLM parses its configuration with pydantic, which would wrap a ValueError
and its text in a report of all arguments.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vlmq_vllm.checkpoint import ModuleInfo, QuantizationSpec
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.foreign import Spec, spec_of
from vlmq_vllm.headers import read_config, read_headers
from vlmq_vllm.names import ModuleTable
from vlmq_vllm.packing import OWN, Packing
from vlmq_vllm.serving.claims import Claims
from vlmq_vllm.serving.segments import Layer
from vlmq_vllm.unserved import KNOWN, why_unserved

HOW_TO = "leave out --quantization to serve it as it is, or quantise it first with `vlmq quantize`"


class VLMQConfig(QuantizationConfig):
    """The parsed config.json (None when there is nothing to parse) and the table of quantised modules."""

    def __init__(self, spec: Spec | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.packing: Packing = OWN
        self.modules: dict[str, ModuleInfo] = {}
        self.plain: set[str] = set()  # modules that own an unpacked weight
        self.biased: set[str] = set()  # quantised modules that own a bias
        self.known = False  # whether the family's layers are all known by name, so that none can be missed
        self.mappers: list[Any] = []
        self.tables: dict[str, ModuleTable] = {}
        self.activation_bits = spec.activation_bits if isinstance(spec, QuantizationSpec) else 16
        self.claims = Claims(self.activation_bits)

    @classmethod
    def get_name(cls) -> str:
        return "vlmq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: without a quantization_config vLLM calls VLMQConfig(), and maybe_update_config says what is wrong."""
        return []

    @classmethod
    def from_config(cls, config: dict) -> "VLMQConfig":
        try:
            return cls(spec_of(config))
        except CheckpointError as error:
            advice = "" if config.get("quant_method") == "vlmq" else f"; {HOW_TO}"
            raise RuntimeError(f"vlmq cannot serve this checkpoint: {error}{advice}") from None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """vLLM asks this for every quantised model in the world: what is ours is taken, and what a user wants served as
        vlmq; from_config says why where it cannot be."""
        method = hf_quant_cfg.get("quant_method") if isinstance(hf_quant_cfg, dict) else None
        return "vlmq" if "vlmq" in (method, user_quant) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers. Raises RuntimeError for a model that is not quantised and for a damaged checkpoint."""
        if self.spec is None:
            raise RuntimeError(
                f"--quantization vlmq was given, but {model_name} is not quantised (its config.json has no "
                f"quantization_config); {HOW_TO}"
            )
        folder = _folder(model_name, revision)
        try:
            headers = read_headers(folder)
            self.packing, self.modules = self.spec.read(folder, headers)
            config = read_config(folder)
        except CheckpointError as error:
            raise RuntimeError(f"{model_name} cannot be served: {error}") from None
        if not self.modules:
            raise RuntimeError(f"{model_name} calls itself quantised, but no tensor is; quantise it anew")
        self.plain = {name.removesuffix(".weight") for name in headers if name.endswith(".weight")}
        self.biased = {module for module in self.modules if f"{module}.bias" in headers}
        self.known = config.get("model_type") in KNOWN
        reasons = {name: why_unserved(name, (info.rows, info.columns), config) for name, info in self.modules.items()}
        self.claims.reasons = {name: reason for name, reason in reasons.items() if reason}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called once per nested model, sometimes twice for the same."""
        if hf_to_vllm_mapper not in self.mappers:
            self.mappers.append(hf_to_vllm_mapper)
            self.tables.clear()

    def get_quant_method(self, layer: Layer, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from vlmq_vllm.serving.compat import complete_head
        from vlmq_vllm.serving.linear import VLMQLinearMethod

        self.claims.note_partial()
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix.removesuffix(".routed_experts"))
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return None
        shards = self._table("quantised").shards(prefix, self.packed_modules_mapping)
        if shards and not isinstance(layer, LinearBase | ParallelLMHead):
            raise ValueError(
                f"{shards[0]} is an embedding and quantised; vlmq serves embeddings at 16 bits only, "
                "quantise again without it"
            )
        if shards:
            if isinstance(layer, ParallelLMHead):
                complete_head(layer, prefix)
            missing = f"{prefix} (a shard that is not quantised)"
            known = [(name or missing, self.modules[name] if name else None) for name in shards]
            self.claims.add(prefix, known)
            return VLMQLinearMethod(known, self)
        self.claims.add(prefix)
        if not isinstance(layer, LinearBase):
            return None
        if self.known and not all(self._table("any").shards(prefix, self.packed_modules_mapping) or [None]):
            self.claims.missing.append(prefix)
        return UnquantizedLinearMethod()

    def get_cache_scale_mapper(self) -> Any:
        """vLLM's common loader asks for this when the model is built and loading begins: the moment to check.

        It also drops GPTQ's g_idx, which `foreign/` has read; vLLM 0.26 has no other place to say so.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        self.check_complete()
        return QuantizationConfig.get_cache_scale_mapper() | WeightsMapper(orig_to_new_suffix={".g_idx": None})

    def check_complete(self) -> None:
        self.claims.finish(self.modules)

    def _table(self, kind: str) -> ModuleTable:
        """Of the quantised modules, or of those with any weight."""
        if kind not in self.tables:
            from vlmq_vllm.serving.compat import map_name

            names = self.modules if kind == "quantised" else self.plain | self.modules.keys()
            self.tables[kind] = ModuleTable(names, [partial(map_name, mapper) for mapper in self.mappers])
        return self.tables[kind]

    def _experts_method(self, layer: Layer, prefix: str) -> QuantizeMethodBase | None:
        found = self._table("quantised").experts(prefix)
        if not found:
            self.claims.add(prefix)
            return None
        if self.activation_bits != 16:
            raise ValueError(
                f"{prefix}: experts of a mixture are served with inputs of 16 bits only, the checkpoint says "
                f"activation_bits {self.activation_bits}; quantise again with --activation-bits 16, or without experts"
            )
        from vlmq_vllm.serving.compat import replaces_experts
        from vlmq_vllm.serving.moe import VLMQMoEMethod

        if replaces_experts(layer):
            raise ValueError(
                f"{prefix}: config.json replaces experts of this layer by constants (approximate_experts), which vLLM "
                "does only beside unquantised experts; quantise again without experts"
            )
        experts = {key: (name, self.modules[name]) for key, name in found.items()}
        self.claims.add(prefix, experts.values())
        return VLMQMoEMethod(layer.moe_config, prefix, experts, self)


def _folder(model_name: str, revision: str | None) -> Path:
    """The model's folder; files of a hub model are fetched into Hugging Face's cache, where vLLM looks for them too."""
    if Path(model_name).is_dir():
        return Path(model_name)
    from huggingface_hub import snapshot_download

    wanted, unwanted = ["*.json", "*.safetensors"], ["*/*", "consolidated*"]
    try:
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        raise RuntimeError(
            f"the safetensors headers of {model_name} cannot be read ({error}); download the model and give its folder"
        ) from error
