"""Defines the demo model's sizes, tokenizer and processor: a real Qwen2-VL, small enough for a repository.

Where it differs from the published Qwen2-VL models, and why:

* M-RoPE base 10 instead of 1e6, with 4 / 14 / 14 of the 32 frequencies for time / height / width. The vision tower
  knows no absolute positions, the language model must read them from M-RoPE; with base 1e6, heads of 64 and sections
  of 8 / 12 / 12 neighbouring columns differ by 0.0002 rad at most, and a small model hardly learns where things are.
* a byte-level BPE of 512 entries, trained on the questions alone, so that signs in answers stay single bytes.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from pictures import COLOURS, draw

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 512
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type in ("image", "image_url") or "image" in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" or "video" in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif "text" in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """Train the BPE on question texts and on answers made of words; signs to be read are left out."""
    words = set(COLOURS) | {"user", "assistant"}
    texts = [q.text for i in range(2000) for q in draw("tokenizer", i).questions if q.task not in ("text", "form")]
    texts += [q.answer for i in range(500) for q in draw("tokenizer", i).questions if q.task == "position"]
    texts += ["What does the text say?", "What is the first sign of the top line?", "Which field says", "What is the"]
    texts += [f"{a} {b} last bottom name code date room total city" for a in words for b in words]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIALS) - len(PADS)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    vocabulary, merges = bpe.get_vocab(), _merges(bpe)
    for token in SPECIALS + PADS:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token=SPECIALS[0],
        eos_token="<|im_end|>",
        additional_special_tokens=[*SPECIALS[1:], *PADS],
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    sizes = {"min_pixels": 56 * 56, "max_pixels": 448 * 448}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "max_window_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 14, 14]},
}
VISION = {"depth": 4, "embed_dim": 192, "num_heads": 3, "hidden_size": 256, "patch_size": 14}


def build_model(tokenizer: Qwen2Tokenizer, text: dict = TEXT, vision: dict = VISION) -> Qwen2VLForConditionalGeneration:
    """Random weights in float32; about 6 million parameters in the demo's sizes."""
    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIALS + PADS}
    text_ids = {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]}
    config = Qwen2VLConfig(
        text_config=text | text_ids,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration(config)


def save(model, processor, folder: Path) -> None:
    """Write the model in bfloat16 with everything that a server needs."""
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
