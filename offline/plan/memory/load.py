"""How much calibration data a run holds: tokens, batches, pixels, and what a stream keeps of each token.

Without the data itself only bounds are known: every sample is taken to have the greatest length, and all its tokens to
be vision tokens.
"""

import inspect
from dataclasses import dataclass

from vlmq_vllm.offline.data.batches import TOKENS
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.quantize import Settings

FLOAT = 4  # bytes; everything is computed in float32


@dataclass(frozen=True)
class Load:
    """Sizes of the calibration data.

    samples, tokens: samples and tokens of each. patches: of the tower per vision token. pixels: bytes of pixel values
    per vision token. kept: bytes that a stream of the decoder keeps per token besides the hidden states (rotary tables,
    masks), and rotary: one of the tower per patch. terms: tensors of the decoder's width that the model adds between
    layers (DeepStack).
    """

    samples: int
    tokens: int
    patches: int
    pixels: int
    kept: int
    rotary: int
    terms: int

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return self.samples * self.tokens

    @property
    def batch(self) -> int:
        """Tokens of the largest batch, as `batches.batched` puts samples of one length together."""
        return self.tokens * min(self.samples, max(1, TOKENS // self.tokens))


def load_of(source: Source, settings: Settings, tokens: int | None = None) -> Load:
    """The load of a run; `tokens` per sample if it is known, else the greatest length that is allowed."""
    samples = settings.samples if settings.row.calibrated else 0
    tokens = tokens or settings.max_tokens
    vision, text = source.model.config.vision_config, source.model.config.get_text_config()
    patches = patches_per_token(source)
    patch = _side(getattr(vision, "patch_size", 14))
    frames = getattr(vision, "temporal_patch_size", 1)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # layers of two kinds of attention, such as Gemma 3's, have a rotary table and a mask [T, T] of one byte each
    kinds = len(set(getattr(text, "layer_types", None) or ("full",)))
    kept = kinds * 2 * head * FLOAT + (kinds * tokens if kinds > 1 else 0)
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    pixels = 3 * frames * patch * patch * patches * FLOAT
    return Load(samples, tokens, patches, pixels, kept, _tower_rotary(source), deepstack)


def _tower_rotary(source: Source) -> int:
    """Bytes of the rotary cos and sin that each patch brings along; 0 where a tower adds positions to its patches."""
    block = source.model.get_submodule(source.family.blocks)[0]
    if "position_embeddings" not in inspect.signature(block.forward).parameters:
        return 0
    vision = source.model.config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    return 2 * width // vision.num_heads * FLOAT


def patches_per_token(source: Source) -> int:
    """Patches of the tower that become one token of the decoder."""
    config = source.model.config
    vision = config.vision_config
    if merge := getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None):
        return int(merge) ** 2
    if ratio := getattr(config, "downsample_ratio", None):
        return round(1 / ratio) ** 2
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return max(1, (_side(vision.image_size) // _side(vision.patch_size)) ** 2 // tokens)
    return 1


def expert_share(source: Source) -> float:
    """The part of all tokens that the mean expert of a mixture sees; 1 without experts."""
    text = source.model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    return (getattr(text, "num_experts_per_tok", None) or 1) / experts


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]
