"""llm-compressor's checkpoints; see writer.py. The truth is what compressed-tensors unpacks from the file."""

from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from writer import TRUTH, in_memory, run, texts

IGNORED = ["re:.*lm_head", "re:.*visual.*"]


def write(base: str, out: str, **groups: dict) -> None:
    """Settings are a recipe's groups; rounded to nearest, or by GPTQ where an order of columns is asked for."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    processor = AutoProcessor.from_pretrained(base)
    recipe = {"config_groups": groups, "ignore": IGNORED}
    if any("actorder" in group["weights"] for group in groups.values()):
        tokenizer = AutoTokenizer.from_pretrained(base)
        samples = [dict(tokenizer(text, return_tensors="pt")) for text in texts(8)]
        oneshot(
            model=model,
            processor=processor,
            dataset=DataLoader(samples, batch_size=None),
            recipe=GPTQModifier(**recipe),
            num_calibration_samples=len(samples),
            sequential_targets=["Qwen2VLDecoderLayer"],
        )
    else:
        oneshot(model=model, processor=processor, recipe=QuantizationModifier(**recipe))
    model.save_pretrained(out, save_compressed=True)
    processor.save_pretrained(out)


def dequantize(folder: Path) -> dict[str, torch.Tensor]:
    """Scales are widened first, so that no product is rounded."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in TRUTH if f"{TRUTH[0]}.weight_packed" in tensors else map(in_memory, TRUTH):
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        scheme = model.get_submodule(in_memory(name)).quantization_scheme
        found[name] = compressor.decompress(parts, scheme)["weight"].float().contiguous()
    return found


run(write, dequantize)
