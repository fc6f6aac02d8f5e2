"""GPTQModel's checkpoints; see writer.py. The truth is what GPTQModel, having loaded its file again, dequantises."""

import os
from pathlib import Path

# Half of the cores by default, but its loader wants two of them: on a machine with two cores it would not start.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQConfig, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from writer import TRUTH, in_memory, run, texts


def write(base: str, out: str, **settings) -> None:
    """Settings are GPTQConfig's arguments. Nothing is offloaded: the file would name the folder."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts(16)]
    model = GPTQModel.load(base, GPTQConfig(offload_to_disk=False, **settings), device="cpu")
    model.quantize(chats, batch_size=1)
    model.save(out)


def dequantize(folder: Path) -> dict[str, torch.Tensor]:
    """Loaded in the scales' own dtype, not the model's; scales are then widened, so that no product is rounded."""
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    found = {}
    for name in map(in_memory, TRUTH):
        layer = model.get_submodule(name)
        layer.scales = layer.scales.float()
        found[name] = super(TorchLinear, layer).dequantize_weight().T.float().contiguous()
    return found


run(write, dequantize)
