"""The type of a model's own processor: what this package calls on it."""

from collections.abc import Mapping
from typing import Any, Protocol


class Processor(Protocol):
    """Turns texts and pictures into a model's inputs; which class of transformers it is, the model's files say.

    tokenizer: of transformers, fast or slow. video_processor: transformers' own; a model without videos has none.
    """

    tokenizer: Any
    video_processor: Any

    def __call__(self, **inputs: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict], **options: Any) -> str: ...
