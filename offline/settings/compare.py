"""What a comparison may be asked for, checked before anything is read."""

from dataclasses import dataclass

from vlmq_vllm.errors import QuantizeError

BACKENDS = ("hf", "vllm")
DTYPES = ("bfloat16", "float16", "float32")
NAMED_IDS = 128  # token ids whose log-probabilities vLLM gives per step


@dataclass(frozen=True)
class Settings:
    """backend, dtype: what runs both models, and in which type.

    device: where transformers runs them ("" is a GPU if there is one). top: outcomes k of the KL divergence besides
    "any other token". new_tokens: length of greedy answers, 0 for none. samples, seed: draw so many chats; None takes
    all. max_tokens: longer chats are left out.

    Raises QuantizeError for a value that cannot be.
    """

    backend: str = "hf"
    dtype: str = "bfloat16"
    device: str = ""
    top: int = 64
    new_tokens: int = 32
    samples: int | None = None
    max_tokens: int = 4096
    seed: int = 42

    def __post_init__(self) -> None:
        for name, allowed in (("backend", BACKENDS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise QuantizeError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        for name, least in (("top", 1), ("new_tokens", 0), ("samples", 1), ("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise QuantizeError(f"{name} is {value}; it must be at least {least}")
        if self.backend == "vllm" and self.top >= NAMED_IDS:
            raise QuantizeError(f"top is {self.top}; vLLM names at most {NAMED_IDS - 1}, use --backend hf for more")
        if self.backend == "vllm" and self.device:
            raise QuantizeError(f"device is {self.device!r}; vLLM chooses its own device, leave --device out")
