"""Checkpoints of the serve benchmark: drawn ones, those of stock vLLM, and when each is made."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import shapes
from benchmarks.serve import checkpoints
from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.headers import read_config, read_headers

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FORMATS = [WeightFormat(4, 64, True), WeightFormat(3, 32, False), WeightFormat(2, 128, True)]


@pytest.fixture
def tiny(monkeypatch):
    """A shape called tiny; with rope sections for its heads of 64."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", (TINY, shapes.TINY_TOWER, True))
    monkeypatch.setattr(shapes, "ROPE", shapes.ROPE | {"mrope_section": [8, 12, 12]})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not iterable
    return found


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"w{format.bits}")
def test_drawn(tiny, tmp_path, format):
    """A packed checkpoint is sound, and dequantises to what its twin holds, bit by bit; the rest is one file."""
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    checkpoints.write_random("tiny", packed, format, decoder_layers=2)
    checkpoints.write_random("tiny", dense, format, packed=False, decoder_layers=2, sibling=packed)
    modules, found, twin = read_modules(packed), tensors(packed), tensors(dense)
    assert len(modules) == 2 * 7 and {module.format for module in modules.values()} == {format}
    assert read_config(packed)["text_config"]["num_hidden_layers"] == 2
    assert "quantization_config" not in read_config(dense)
    for name in modules:
        parts = {part: found.pop(f"{name}.{part}") for part in format.shapes(32, 32)}
        weight = QuantizedWeight.from_tensors(format, parts).dequantize(torch.bfloat16)
        assert torch.equal(twin.pop(f"{name}.weight"), weight)
        # uniform codes, scales that differ by up to three times: 0.02 * sqrt(1 + 1/12); 4,096 codes at least
        assert weight.float().std().item() == pytest.approx(0.0208, rel=0.1)
    assert found.keys() == twin.keys() and all(torch.equal(found[name], twin[name]) for name in found)
    assert os.path.samefile(packed / checkpoints.REST, dense / checkpoints.REST)
    assert checkpoints.size(dense) > checkpoints.size(packed)


def test_drawn_for_transformers(tiny, tmp_path):
    """The 16-bit model's files have the names and shapes that the real class asks for."""
    from transformers import Qwen2VLForConditionalGeneration

    checkpoints.write_random("tiny", tmp_path / "dense", FORMATS[0], packed=False)
    _, told = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    index = json.loads((tmp_path / "dense/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "dense").values())


def test_drawn_anew():
    """The same name gives the same weight, another one another; every code occurs about equally often."""
    format = FORMATS[1]
    first, again = (checkpoints.draw_packed("a", 64, 512, format) for _ in range(2))
    assert all(torch.equal(first[part], again[part]) for part in first)
    assert not torch.equal(first["weight_packed"], checkpoints.draw_packed("b", 64, 512, format)["weight_packed"])
    counts = torch.bincount(QuantizedWeight.from_tensors(format, first).codes.flatten().long())
    assert len(counts) == 8 and (counts - 4096).abs().max() < 300  # 5 standard deviations of sqrt(4096 * 7 / 8)


def test_stock(tiny, tmp_path):
    """The same files under the header of compressed-tensors, which takes it; what is not quantised is named."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packed, stock = tmp_path / "packed", tmp_path / "stock"
    checkpoints.write_random("tiny", packed, FORMATS[0], decoder_layers=1)
    checkpoints.write_stock(packed, stock)
    header = read_config(stock)["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(header).config_groups["group_0"].weights
    assert (scheme.num_bits, scheme.group_size, scheme.symmetric, scheme.strategy) == (4, 64, True, "group")
    assert read_headers(stock) == read_headers(packed)
    assert {"lm_head", "model.embed_tokens", "visual.blocks.0.attn.qkv"} < set(header["ignore"])
    assert not set(header["ignore"]) & set(read_modules(packed))
    assert os.path.samefile(packed / checkpoints.REST, stock / checkpoints.REST)


def test_models(tiny, tmp_path, monkeypatch):
    """Each checkpoint is made once, when it is asked for; half of one is no checkpoint."""
    models = checkpoints.Models(tmp_path, None, "tiny", 1, FORMATS[0])
    stock = models.folder(4, True)
    assert stock.name == "w4-stock" and models.folder(4, False).name == "w4" and not (tmp_path / "bf16").exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", lambda *args, **more: 1 / 0)
        assert models.folder(4, True) == stock
        with pytest.raises(ZeroDivisionError):
            models.folder(None, False)
    dense = models.folder(None, False)
    assert os.path.samefile(dense / checkpoints.REST, stock / checkpoints.REST)
    assert {info.dtype for info in read_headers(dense).values()} == {"BF16"}
    real = checkpoints.Models(tmp_path, tmp_path / "given", None, None, FORMATS[0])
    assert real.folder(None, False) == tmp_path / "given"


def test_refused_model(tmp_path):
    with pytest.raises(RuntimeError, match="config.json"):
        checkpoints.quantize(tmp_path, tmp_path / "out", FORMATS[0])
