"""Tiny random vision-language models of the families that people use, as folders like those of the hub.

`build(name, folder)` writes config.json, model.safetensors under the hub's tensor names, generation_config.json, a
tokenizer, processor files and a chat template. The architectures are transformers' own; only sizes are small and the
weights random (bfloat16, seed fixed). Each family keeps what makes it special: M-RoPE, window attention, DeepStack,
experts behind a router, tiles of an image, sliding next to full attention. What a family's tokenizer and processor
look like is in `family_processors.py`.

Common sizes: decoder 3 layers, hidden 128, 4 heads of 32 and 2 for keys and values, inner size 208 (no multiple of
64 or 128); vision tower 3 blocks, hidden 64, 2 heads, inner size 176.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig

from family_processors import PROCESSORS, build_processor

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-6,
}
HEAD = {"head_dim": 32}
QWEN2 = TEXT | {"model_type": "qwen2"}
LLAMA = TEXT | HEAD | {"model_type": "llama"}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
INTERLEAVED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}

QWEN_TOWER = {"depth": 3, "num_heads": 2, "initializer_range": 0.08}
QWEN3_TOWER = QWEN_TOWER | {
    "hidden_size": 64,
    "intermediate_size": 176,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "initializer_range": 0.08,
}
# transformers 5.20 and later want a SmolVLM tile's tokens to be a multiple of the patch's side: 4 here, 64 of 16 in the
# hub's.
TILE = TOWER | {"image_size": 16, "patch_size": 4}
# SigLIP's configuration knows no initializer_range; the towers of the hub leave out its pooling head.
SIGLIP = {k: v for k, v in TOWER.items() if k != "initializer_range"} | {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
}


@dataclass(frozen=True)
class Family:
    """Configuration of one family; the key in FAMILIES is the model_type of config.json.

    tokens: key of config.json to the special token whose id it holds. tied: lm_head is the embedding and not in
    the file, as in Qwen2-VL-2B, Qwen3-VL-2B and every Gemma 3.
    """

    text: dict
    vision: dict
    tokens: dict[str, str]
    tied: bool = False
    others: dict = field(default_factory=dict)


QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
IDEFICS_TOKENS = {"image_token_id": "<image>", "pad_token_id": "<|endoftext|>"}
FAMILIES = {
    "qwen2_vl": Family(
        text=TEXT | {"rope_parameters": MROPE},
        vision=QWEN_TOWER | {"embed_dim": 64, "hidden_size": 128},
        tokens=QWEN_TOKENS,
        tied=True,
    ),
    "qwen2_5_vl": Family(
        text=TEXT | {"rope_parameters": MROPE},
        # windows of 2 x 2 merged patches, so that a picture of 112 pixels has several; block 1 sees everything
        vision=QWEN_TOWER
        | {"hidden_size": 64, "intermediate_size": 176, "out_hidden_size": 128}
        | {"window_size": 56, "fullatt_block_indexes": [1]},
        tokens=QWEN_TOKENS,
    ),
    "qwen3_vl": Family(
        text=TEXT | HEAD | {"rope_parameters": INTERLEAVED}, vision=QWEN3_TOWER, tokens=QWEN_TOKENS, tied=True
    ),
    "qwen3_vl_moe": Family(
        text=TEXT
        | HEAD
        | {"rope_parameters": INTERLEAVED, "mlp_only_layers": [0], "moe_intermediate_size": 96}
        | {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
        vision=QWEN3_TOWER,
        tokens=QWEN_TOKENS,
    ),
    "llava": Family(
        text=LLAMA,
        vision=TOWER | {"model_type": "clip_vision_model", "projection_dim": 64},
        tokens={"image_token_index": "<image>"},
        others={"image_seq_length": 16},
    ),
    "llava_onevision": Family(
        text=QWEN2,
        vision=SIGLIP,
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        others={"image_grid_pinpoints": [[56, 56], [56, 112], [112, 56]]},
    ),
    "internvl": Family(
        text=QWEN2,
        vision=TOWER | {"image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True},
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        others={"image_seq_length": 4},
    ),
    "smolvlm": Family(text=LLAMA, vision=TILE, tokens=IDEFICS_TOKENS, others={"scale_factor": 2}),
    "idefics3": Family(text=LLAMA, vision=TILE, tokens=IDEFICS_TOKENS, others={"scale_factor": 2}),
    "gemma3": Family(
        # a window of 8 tokens is shorter than any sample
        text=TEXT
        | HEAD
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | {"query_pre_attn_scalar": 32}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            }
        },
        vision=SIGLIP,
        tokens={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        tied=True,
        others={"mm_tokens_per_image": 4},
    ),
}
VIDEO = tuple(name for name in FAMILIES if PROCESSORS[name].video)


def build(name: str, folder: Path) -> None:
    """Write the tiny model of the family `name` with its tokenizer and processor into `folder`."""
    tokenizer = build_processor(name, folder)
    model = _build_model(FAMILIES[name], name, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(dict(_published(name, load_file(path))), path, metadata={"format": "pt"})


def _published(name: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as the hub has them, where save_pretrained does not go all the way back to the old files.

    CLIP's and SigLIP's towers lost the level `vision_model` in transformers 5; a stack of experts is [E, in, out] in
    the published Qwen3-VL files and [E, out, in] in memory.
    """
    for key, tensor in tensors.items():
        if FAMILIES[name].vision.get("model_type") in ("clip_vision_model", "siglip_vision_model"):
            key = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key)
        yield key, tensor.transpose(1, 2).contiguous() if ".experts." in key else tensor


def _build_model(family: Family, name: str, tokenizer) -> torch.nn.Module:
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    vocabulary = -(-len(tokenizer) // 64) * 64
    config = CONFIG_MAPPING[name](
        text_config=family.text | ids | {"vocab_size": vocabulary, "tie_word_embeddings": family.tied},
        vision_config=dict(family.vision),
        tie_word_embeddings=family.tied,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in family.tokens.items()},
        **family.others,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        _disturb(model)
    return model


@torch.no_grad()
def _disturb(model: torch.nn.Module) -> None:
    """Move every parameter: zero biases and norms of ones would hide a forgotten bias or a swapped norm."""
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
