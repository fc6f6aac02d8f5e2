"""Makes the checkpoints of the serve benchmark: one model at 16, 4, 3 and 2 bits, and as stock vLLM reads it.

Of a shape in `benchmarks/shapes.py` they are drawn: codes are random words, which are codes as good as any and need no
packing, so a 7B model takes as long as the disk does. The 16-bit model holds what the 4-bit one dequantises to.
Whatever is not quantised (embeddings, vision tower, norms) lies in a file that all widths share by hard links. A model
that exists is quantised by `vlmq quantize --method rtn` instead, which needs no data; speed does not depend on what
weights say.

The packed bytes are also those of compressed-tensors' pack-quantized: for stock vLLM only config.json is another one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.shapes import draw, write_settings
from vlmq_vllm.checkpoint import QuantizationSpec, read_modules
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.headers import INDEX, read_config, read_headers

DEVIATION = 0.02  # of weights, as in shapes.py
LINEAR = re.compile(r"model\.layers\.(\d+)\..*_proj\.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
REST = "model-rest.safetensors"


@dataclass
class Models:
    """Folders of one model's checkpoints in `work`, each made when it is asked for first.

    model: one that exists, or None for random weights of `shape` with so many decoder layers. format: of the 4-bit
    weights, and but for the bits of all. drawn: a folder that others of that shape share files with.
    """

    work: Path
    model: Path | None
    shape: str | None
    decoder_layers: int | None
    format: WeightFormat
    drawn: Path | None = None

    def folder(self, bits: int | None, stock: bool) -> Path:
        """At so many bits, or at 16 for None; stock: as stock vLLM reads it. Raises RuntimeError."""
        if bits is None and self.model:
            return self.model
        folder = self.work / (f"w{bits}" if bits else "bf16")
        if not folder.is_dir():
            self._make(folder, bits)
        if not stock:
            return folder
        out = folder.with_name(f"{folder.name}-stock")
        if not out.is_dir():
            write_stock(folder, out)
        return out

    def _make(self, folder: Path, bits: int | None) -> None:
        format = replace(self.format, bits=bits or 4)
        if self.model:
            quantize(self.model, folder, format)
            return
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_random(self.shape, unfinished, format, bits is not None, self.decoder_layers, self.drawn)
        unfinished.rename(folder)
        self.drawn = self.drawn or folder


def write_random(
    shape: str,
    folder: Path,
    format: WeightFormat,
    packed: bool = True,
    decoder_layers: int | None = None,
    sibling: Path | None = None,
) -> None:
    """A model of that shape in the new `folder`, one decoder layer in memory at a time.

    packed: a vlmq checkpoint; otherwise the same weights in bfloat16. sibling: another one of this shape, to share
    what is not quantised with.
    """
    shapes = write_settings(shape, folder, decoder_layers)
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(_file(name), []).append(name)
    weight_map, total = {}, 0
    for file, names in files.items():
        if file == REST and sibling is not None:
            os.link(sibling / REST, folder / REST)
            weight_map |= dict.fromkeys(names, REST)
            total += sum(2 * shapes[name].numel() for name in names)
            continue
        tensors = {}
        for name in names:
            tensors |= _tensors(name, shapes[name], format, packed)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if packed:
        header = QuantizationSpec(format, {}).to_dict({"name": "benchmarks/serve/throughput.py", "weights": "random"})
        _write_json(folder / "config.json", read_config(folder) | {"quantization_config": header})


def draw_packed(name: str, rows: int, columns: int, format: WeightFormat) -> dict[str, torch.Tensor]:
    """A random weight's tensors by part name, the same for the same name, size and format.

    Every word must be filled: columns * bits, and of asymmetric ones rows * bits, are multiples of 32.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    sizes = format.shapes(rows, columns)
    assert columns * format.bits % 32 == 0 and (format.symmetric or rows * format.bits % 32 == 0)
    deviation = ((format.levels**2 - 1) / 12 * (1 if format.symmetric else 2)) ** 0.5  # of code - zero
    scale = torch.empty(sizes["weight_scale"]).uniform_(0.5, 1.5, generator=generator)
    parts = {
        part: torch.randint(-(1 << 31), 1 << 31, sizes[part], dtype=torch.int32, generator=generator)
        for part in ("weight_packed", "weight_zero_point")
        if part in sizes
    }
    return parts | {
        "weight_scale": (DEVIATION / deviation * scale).to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def quantize(model: Path, folder: Path, format: WeightFormat) -> None:
    """Round a model that exists. Raises RuntimeError with the last line that vlmq said."""
    command = [sys.executable, "-m", "vlmq_vllm.offline", "quantize", model, "-o", folder, "--method", "rtn"]
    command += ["--bits", format.bits, "--group-size", format.group_size]
    command += ["--symmetric"] if format.symmetric else []
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "vlmq quantize failed").splitlines()[-1])


def write_stock(folder: Path, out: Path) -> None:
    """The vlmq checkpoint `folder` as one of compressed-tensors in the new folder `out`; weights are hard links."""
    modules = read_modules(folder)
    formats = {module.format for module in modules.values()}
    assert len(formats) == 1, "all of a benchmark's weights have one format"
    weights = {name.removesuffix(".weight") for name in read_headers(folder) if name.endswith(".weight")}
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, out / path.name)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    header = _compressed_tensors(formats.pop(), sorted(weights | {"lm_head"}))
    _write_json(out / "config.json", read_config(folder) | {"quantization_config": header})


def size(folder: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _compressed_tensors(format: WeightFormat, ignored: list[str]) -> dict:
    weights = {"num_bits": format.bits, "type": "int", "symmetric": format.symmetric}
    weights |= {"strategy": "channel" if format.group_size == -1 else "group"}
    weights |= {"group_size": None if format.group_size == -1 else format.group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "ignore": ignored,
    }


def _file(name: str) -> str:
    """One file for each decoder layer and one for the rest."""
    layer = LAYER.match(name)
    return f"model-layer-{int(layer[1]):03d}.safetensors" if layer else REST


def _tensors(name: str, shape: torch.Size, format: WeightFormat, packed: bool) -> dict[str, torch.Tensor]:
    """What the file holds for the weight called `name`."""
    if not LINEAR.fullmatch(name):
        return {name: draw(name, shape, torch.Generator().manual_seed(zlib.crc32(name.encode())))}
    parts = draw_packed(name, *shape, format)
    if not packed:
        return {name: QuantizedWeight.from_tensors(format, parts).dequantize(torch.bfloat16)}
    return {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
