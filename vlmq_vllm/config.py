"""VLMQConfig: what `--quantization vlmq` means to vLLM, and which of a model's layers are quantised.

The front end parses config.json and reads the safetensors headers once into a plain table module name -> ModuleInfo,
which is pickled to the workers. A worker then asks for every layer it builds; the table alone decides, through the
names of `names.py`. Before the first weight is loaded every module of the table must have found its layer.

Errors of the front end are RuntimeErrors: vLLM parses its configuration with pydantic, which would wrap a ValueError
and its text in a report of all arguments.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vlmq_vllm.checkpoint import ModuleInfo, QuantizationSpec, read_modules
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.names import ModuleTable

logger = init_logger(f"vllm.{__name__}")

HOW_TO = "leave out --quantization to serve it as it is, or quantise it first with `vlmq quantize`"


class VLMQConfig(QuantizationConfig):
    """Plain data: the parsed config.json (None when there is nothing to parse) and the table of quantised modules."""

    def __init__(self, spec: QuantizationSpec | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.modules: dict[str, ModuleInfo] = {}
        self.mappers: list = []
        self.table: ModuleTable | None = None
        self.claimed: set[str] = set()
        self.plain = 0
        self.partial = False
        self.complete = False

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
        if config.get("quant_method") != "vlmq":
            found = config.get("quant_method")
            raise RuntimeError(f"--quantization vlmq was given, but the model is quantised with {found!r}; {HOW_TO}")
        try:
            return cls(QuantizationSpec.from_dict(config))
        except CheckpointError as error:
            raise RuntimeError(str(error)) from None

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None) -> str | None:
        """vLLM asks this for every quantised model in the world, so only what is ours or asked for is taken.

        Another method's model that a user wants served as vlmq is taken too: from_config then says why it cannot be.
        """
        method = hf_quant_cfg.get("quant_method") if isinstance(hf_quant_cfg, dict) else None
        return "vlmq" if "vlmq" in (method, user_quant) else None

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None) -> None:
        """Read the headers. Raises RuntimeError for a model that is not quantised and for a damaged checkpoint."""
        if self.spec is None:
            raise RuntimeError(
                f"--quantization vlmq was given, but {model_name} is not quantised (its config.json has no "
                f"quantization_config); {HOW_TO}"
            )
        try:
            self.modules = read_modules(_folder(model_name, revision))
        except CheckpointError as error:
            raise RuntimeError(f"{model_name} cannot be served: {error}") from None
        if not self.modules:
            raise RuntimeError(f"{model_name} calls itself vlmq, but no tensor is quantised; quantise it anew")

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Called once per nested model, sometimes twice for the same."""
        if hf_to_vllm_mapper not in self.mappers:
            self.mappers.append(hf_to_vllm_mapper)
            self.table = None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        self._note_partial()
        if isinstance(layer, RoutedExperts):
            self._refuse_experts(prefix)
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return None
        shards = self._table().shards(prefix, self.packed_modules_mapping)
        if shards and not isinstance(layer, LinearBase | ParallelLMHead):
            raise ValueError(
                f"{shards[0]} is an embedding and quantised; vlmq serves embeddings at 16 bits only, "
                "quantise again without it"
            )
        if shards:
            return self._method(prefix, shards)
        self.plain += 1
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_cache_scale_mapper(self):
        """vLLM's common loader asks for this when the model is built and loading begins: the moment to check."""
        self.check_complete()
        return QuantizationConfig.get_cache_scale_mapper()

    def check_complete(self) -> None:
        """Once per process: log what is quantised; raises ValueError for modules that vLLM built no layer for.

        Called before the first weight, or by the first finished layer of models that load without the common loader.
        """
        if self.complete:
            return
        self.complete = True
        widths = Counter(self.modules[name].format.bits for name in self.claimed)
        counts = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(widths.items()))
        logger.info("vlmq: %d weights quantised (%s), %d layers at 16 bits", len(self.claimed), counts, self.plain)
        unclaimed = sorted(set(self.modules) - self.claimed)
        if unclaimed and self.partial:
            logger.warning(
                "vlmq: no layer in this process (a pipeline stage or a draft model?) for %d quantised modules: %s ...",
                len(unclaimed),
                ", ".join(unclaimed[:3]),
            )
        elif unclaimed:
            raise ValueError(
                f"vLLM builds no quantisable layer for {', '.join(unclaimed[:3])} ({len(unclaimed)} of "
                f"{len(self.modules)} quantised modules); quantise again without them"
            )

    def _table(self) -> ModuleTable:
        if self.table is None:
            from vlmq_vllm.compat import map_name

            self.table = ModuleTable(self.modules, [partial(map_name, mapper) for mapper in self.mappers])
        return self.table

    def _method(self, prefix: str, shards: tuple[str | None, ...]):
        from vlmq_vllm.linear import VLMQLinearMethod

        self.claimed.update(name for name in shards if name)
        missing = f"{prefix} (a shard that is not quantised)"
        return VLMQLinearMethod([(name, self.modules[name]) if name else (missing, None) for name in shards], self)

    def _refuse_experts(self, prefix: str) -> None:
        experts = self._table().below(prefix.removesuffix(".routed_experts"))
        if experts:
            raise ValueError(
                f"{experts[0]} and {len(experts) - 1} more are quantised experts; vlmq does not serve quantised "
                "mixtures of experts yet, quantise again without them"
            )

    def _note_partial(self) -> None:
        """With pipeline stages or a draft model a process builds some of the modules and need not claim all."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None:
            staged = config.parallel_config.pipeline_parallel_size > 1
            self.partial = self.partial or staged or config.speculative_config is not None


def _folder(model_name: str, revision: str | None) -> Path:
    """The model's folder; files of a hub model are fetched into Hugging Face's cache, where vLLM looks for them too."""
    if Path(model_name).is_dir():
        return Path(model_name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise RuntimeError(
            f"the safetensors headers of {model_name} cannot be read ({error}); download the model and give its folder"
        ) from error
