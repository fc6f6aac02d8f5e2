"""AutoRound's checkpoints; see writer.py. The truth is AutoRound's own layer times the identity."""

import json
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing as layer_class
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from writer import TRUTH, in_memory, run, texts

TUNING = {"iters": 2, "nsamples": 4, "seqlen": 16, "batch_size": 1, "device_map": "cpu"}


def write(base: str, out: str, format: str, **settings) -> None:
    """Settings are AutoRound's arguments, and the format of its export."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = [dict(tokenizer(text, return_tensors="pt", max_length=16, truncation=True)) for text in texts(4)]
    quantiser = AutoRound(
        model,
        tokenizer,
        processor=AutoProcessor.from_pretrained(base),
        dataset=DataLoader(samples, batch_size=None),
        **TUNING | settings,
    )
    quantiser.quantize_and_save(out, format=format)
    (written,) = Path(out).iterdir()  # a folder named after base and bits
    for path in written.iterdir():
        path.rename(Path(out) / path.name)
    written.rmdir()


@torch.no_grad()
def dequantize(folder: Path) -> dict[str, torch.Tensor]:
    """Scales are widened first, so that no product is rounded.

    The layers are made here, of the classes that packed them: on a CPU AutoRound's loader has no layer for zero points
    in GPTQ's packing and leaves random weights. A layer with g_idx fails where it is not square: made without one.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in TRUTH:
        settings = config | config.get("extra_config", {}).get(in_memory(name), {})
        bits, group_size = settings["bits"], settings["group_size"]
        kind = layer_class(settings.get("packing_format", "gptq"), bits, group_size, settings["sym"])
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        columns = qweight.shape[0] * 32 // bits
        layer = kind(bits, group_size, columns, qweight.shape[1], bias=False, g_idx=False)
        layer.qweight, layer.qzeros, layer.scales = qweight, qzeros, scales.float()
        found[name] = layer(torch.eye(columns)).T.contiguous()
    return found


run(write, dequantize)
