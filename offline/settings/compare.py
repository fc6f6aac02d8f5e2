"""The settings of `vlmq compare`, checked before anything is read."""

from dataclasses import dataclass

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.option import check_options, option

BACKENDS = ("hf", "vllm")
DTYPES = ("bfloat16", "float16", "float32")
NAMED_IDS = 128  # token ids whose log-probabilities vLLM gives per step


@dataclass(frozen=True)
class CompareSettings:
    """Settings of `vlmq compare`. Raises QuantizeError for a value that cannot be."""

    backend: str = option("hf", "transformers with unpacked weights (hf), or vLLM as it serves (vllm).", BACKENDS)
    dtype: str = option("bfloat16", "Type in which both models run.", DTYPES)
    device: str = option("", "For hf: cpu, cuda, cuda:1 ... Default: a GPU if there is one.")
    top: int = option(64, "Likeliest tokens in the KL divergence; the rest counts as one outcome.", least=1)
    max_new_tokens: int = option(32, "Length of greedy answers; 0: generate none.", least=0)
    samples: int | None = option(None, "Use so many chats, drawn by --seed. Default: all.", least=1)
    max_tokens: int = option(4096, "Leave out longer chats.", least=1)
    seed: int = option(42, "Decides the drawn chats and the bootstrap.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.backend == "vllm" and self.top >= NAMED_IDS:
            raise QuantizeError(f"top is {self.top}; vLLM names at most {NAMED_IDS - 1}, use --backend hf for more")
        if self.backend == "vllm" and self.device:
            raise QuantizeError(f"device is {self.device!r}; vLLM chooses its own device, leave --device out")
