"""Sizes that memory is made of: the calibration data that a run holds, the streams of a stack, a layer's linears.

Without the data itself every sample is taken to have the greatest length, and all its tokens to be vision tokens.
"""

import inspect
from dataclasses import dataclass

import torch

from vlmq_vllm.offline.data.batches import TOKENS
from vlmq_vllm.offline.model.layers import named_linears, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.quantize import KEPT, Settings

FLOAT = 4  # bytes; everything is computed in float32
# tensors of a token that are alive at once, counted in the forward passes of Qwen2's layers and tower
ATTENTION_GRAPH, MLP_GRAPH, MLP = 12, 5, 3


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
    vision, text = source.parsed.vision_config, source.parsed.get_text_config()
    patches = patches_per_token(source)
    patch = _side(getattr(vision, "patch_size", 14))
    frames = getattr(vision, "temporal_patch_size", 1)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # layers of two kinds of attention, such as Gemma 3's, have a rotary table and a mask [T, T] of one byte each
    kinds = len(set(getattr(text, "layer_types", None) or ("full",)))
    kept = kinds * 2 * head * FLOAT + (kinds * tokens if kinds > 1 else 0)
    # a tower whose blocks take no rotary cos and sin adds positions to its patches
    block = source.stack(source.family.blocks)[0]
    rotary = 0
    if "position_embeddings" in inspect.signature(block.forward).parameters:
        rotary = 2 * (getattr(vision, "embed_dim", None) or vision.hidden_size) // vision.num_heads * FLOAT
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return Load(samples, tokens, patches, 3 * frames * patch * patch * patches * FLOAT, kept, rotary, deepstack)


def patches_per_token(source: Source) -> int:
    """Patches of the tower that become one token of the decoder."""
    config, vision = source.parsed, source.parsed.vision_config
    if merge := getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None):
        return int(merge) ** 2
    if ratio := getattr(config, "downsample_ratio", None):
        return round(1 / ratio) ** 2
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return max(1, (_side(vision.image_size) // _side(vision.patch_size)) ** 2 // tokens)
    return 1


def expert_share(source: Source) -> float:
    """The part of all tokens that the mean expert of a mixture sees; 1 without experts."""
    text = source.parsed.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    return (getattr(text, "num_experts_per_tok", None) or 1) / experts


def streams_of(settings: Settings, component: str, width: int, load: Load, moved: bool) -> tuple[int, int]:
    """Bytes of a stack's streams before its first layer and after it, as `run/begin.py` captures them.

    Where nothing tells both streams apart, the full-precision one is captured together with the quantised one: hidden
    states are shared until a layer has run, what comes with them (rotary tables, masks, DeepStack) for good. After a
    quantised tower or connector, and where inputs are rounded, everything is held twice. width: features of a hidden
    state. moved: some of the tower or connector is quantised.
    """
    if component == "language":
        count, others, paired = load.total, load.kept + load.terms * width * FLOAT, settings.paired
    else:
        count, others, paired = load.total * load.patches, load.rotary, settings.residual
    if component == "connector":
        others = 0  # it is called with nothing else
    apart = paired and (moved and component != "vision" or settings.activation_bits != KEPT)
    states, beside = count * width * FLOAT, count * others * (2 if apart else 1)
    return states * (2 if apart else 1) + beside, states * (2 if paired else 1) + beside


@dataclass(frozen=True)
class LayerSize:
    """The sizes of a component's layer.

    shapes: [rows, columns] of its linears. bytes: all parameters, in float32. inner, width: the greatest number of
    features inside it and of what it passes on, per token of the decoder, or per patch of the tower.
    """

    shapes: dict[str, tuple[int, int]]
    bytes: int
    inner: int
    width: int

    @property
    def linears(self) -> int:
        """Bytes of all linears' weights in float32."""
        return FLOAT * sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def activations(self) -> int:
        """Bytes of a token's activations in a forward pass."""
        return FLOAT * (MLP * self.inner + self.width)

    @property
    def graph(self) -> int:
        """Bytes of a token's activations in the layer's graph."""
        return FLOAT * (ATTENTION_GRAPH * self.width + MLP_GRAPH * self.inner)


def layer_of(source: Source, component: str, name: str, load: Load) -> LayerSize:
    """The layer with the in-memory name `name`; a connector, which joins patches, per patch."""
    module = source.model.get_submodule(name)
    shapes = {linear: (weight.shape[0], weight.shape[1]) for linear, weight in weights_of(module).items()}
    inner, width = widest(module)[0], source.parsed.get_text_config().hidden_size
    if component != "language":
        width = widest(source.stack(source.family.blocks)[0])[1]
    if component == "connector":
        inner = -(-inner // load.patches)
    return LayerSize(shapes, FLOAT * numel(module), inner, width)


def widest(layer: torch.nn.Module) -> tuple[int, int]:
    """The greatest and the least number of columns of a layer's linears."""
    columns = [linear.in_features for linear in named_linears(layer).values()]
    return max(columns), min(columns)


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]
