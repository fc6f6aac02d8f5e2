"""Tokenizers, processors and chat templates for the models of `family_models.py`, made without any download.

All families share one byte-level BPE of a few hundred entries and add their own special tokens. Pictures become small:
56 or 112 pixels, so that a sample has 10 to 100 tokens. Files are written part by part, as in the hub's folders, not
by a processor object: SmolVLM's processor cannot be made without the package num2words.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "What is the colour of the picture? The picture is red and blue.",
    "user: how many signs are there in the video? assistant: there are two signs in the first picture.",
    "Describe the picture, then the text in the picture. It shows a number and a word.",
)
TEMPLATE = """\
{%- for message in messages -%}
OPEN{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type in ("image", "image_url") or "image" in part -%}IMAGE
{%- elif part.type == "video" or "video" in part -%}VIDEO
{%- elif "text" in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{% endif %}CLOSE
{% endfor -%}
{%- if add_generation_prompt -%}OPENassistant
{% endif -%}
"""


@dataclass(frozen=True)
class Processor:
    """One row: classes by name, with their settings; what a part of a message becomes in the text.

    named: special tokens that the processor asks of the tokenizer by name. words: plain tokens that vLLM looks up.
    turn: first and last token of a message, the last one ends the answer. video, video_processor: None where the family
    has no videos.
    """

    processor: str
    image_processor: str
    sizes: dict
    image: str
    turn: tuple[str, str]
    specials: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    video: str | None = None
    video_processor: str | None = None
    video_sizes: dict = field(default_factory=dict)


CHATML = ("<|im_start|>", "<|im_end|>")
QWEN = {
    "turn": CHATML,
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "specials": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "image_processor": "Qwen2VLImageProcessor",
}
PIXELS = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
QWEN2 = QWEN | {"sizes": PIXELS, "video_processor": "Qwen2VLVideoProcessor", "video_sizes": PIXELS}
QWEN3_PIXELS = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
QWEN3_FRAMES = {"size": {"shortest_edge": 4 * 64 * 64, "longest_edge": 4 * 64 * 64}}  # of all frames together
QWEN3 = QWEN | {
    "processor": "Qwen3VLProcessor",
    "sizes": QWEN3_PIXELS | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "video_processor": "Qwen3VLVideoProcessor",
    "video_sizes": QWEN3_FRAMES,
}
SQUARE = {"size": {"height": 56, "width": 56}}
TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
IDEFICS = {
    "turn": ("<|im_start|>", "<end_of_utterance>"),
    "image": "<image>",
    "specials": ("<image>", "<fake_token_around_image>", "<global-img>")
    + tuple(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)),
    "settings": {"image_seq_len": 4},
    "sizes": TILES,
}

PROCESSORS = {
    "qwen2_vl": Processor("Qwen2VLProcessor", **QWEN2),
    "qwen2_5_vl": Processor("Qwen2_5_VLProcessor", **QWEN2),
    "qwen3_vl": Processor(**QWEN3),
    "qwen3_vl_moe": Processor(**QWEN3),
    "llava": Processor(
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessor",
        sizes={"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        image="<image>",
        turn=("<s>", "</s>"),
        specials=("<image>",),
        settings={"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": Processor(
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessor",
        sizes=SQUARE | {"image_grid_pinpoints": [[56, 56], [56, 112], [112, 56]]},
        image="<image>",
        turn=CHATML,
        specials=("<image>", "<video>"),
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        video="<video>",
        video_processor="LlavaOnevisionVideoProcessor",
        video_sizes=SQUARE,
    ),
    "internvl": Processor(
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessor",
        sizes=SQUARE | {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        image="<IMG_CONTEXT>",
        turn=CHATML,
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        settings={"image_seq_length": 4},
        video="<video>",
        video_processor="InternVLVideoProcessor",
        video_sizes=SQUARE,
    ),
    "smolvlm": Processor(
        processor="SmolVLMProcessor",
        image_processor="SmolVLMImageProcessor",
        **IDEFICS | {"specials": (*IDEFICS["specials"], "<video>")},
        video="<video>",
        video_processor="SmolVLMVideoProcessor",
        video_sizes=TILES | {"size": {"longest_edge": 16}, "fps": 1, "num_frames": 4},
    ),
    "idefics3": Processor(processor="Idefics3Processor", image_processor="Idefics3ImageProcessor", **IDEFICS),
    "gemma3": Processor(
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessor",
        sizes=SQUARE,
        image="<start_of_image>",
        turn=("<start_of_turn>", "<end_of_turn>"),
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        words=tuple("\n" * count for count in range(1, 5)),
        settings={"image_seq_length": 4},
    ),
}


def build_processor(name: str, folder: Path) -> PreTrainedTokenizerFast:
    """Write all files of the family's processor into `folder`; returns the tokenizer."""
    row = PROCESSORS[name]
    tokenizer = _build_tokenizer(row)
    tokenizer.chat_template = _template(row)
    tokenizer.save_pretrained(folder)
    getattr(transformers, row.image_processor)(**row.sizes).save_pretrained(folder)
    if row.video_processor:
        getattr(transformers, row.video_processor)(**row.video_sizes).save_pretrained(folder)
    settings = {"processor_class": row.processor} | row.settings
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def _build_tokenizer(row: Processor) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    bpe.add_tokens(list(row.words))
    bpe.add_special_tokens(["<|endoftext|>", *row.turn, *row.specials, *row.named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        bos_token=row.turn[0],
        eos_token=row.turn[1],
        additional_special_tokens=[*row.specials],
        extra_special_tokens=row.named,
        model_max_length=1024,
    )


def _template(row: Processor) -> str:
    words = {"OPEN": row.turn[0], "CLOSE": row.turn[1], "IMAGE": row.image, "VIDEO": row.video or ""}
    template = TEMPLATE
    for word, text in words.items():
        template = template.replace(word, text)
    return template
