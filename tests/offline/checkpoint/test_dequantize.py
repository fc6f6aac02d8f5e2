"""`vlmq dequantize` of a mixture of experts: packed one by one, they come back in the fused tensors of the hub's files.

Dense models are compared in tests/offline/run/test_quantize.py, what transformers loads from the twins in
tests/plugin/test_huggingface.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from family_models import build
from foreign_checkpoints import NAMES, REFUSED, expected, restore
from mixed_formats import quantize_mixed
from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.headers import INDEX
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

EXPERTS, HIDDEN, INNER = 6, 128, 96
LAYERS = [f"model.language_model.layers.{layer}.mlp.experts" for layer in (1, 2)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(source, packed folder) of a model with two layers of experts, neighbours in different formats."""
    folder = tmp_path_factory.mktemp("mixture")
    build("qwen3_vl_moe", folder / "model")
    quantize_mixed(folder / "model", folder / "packed")
    return folder / "model", folder / "packed"


@pytest.fixture
def packed(mixture, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(mixture[1], tmp_path / "packed")


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def weights(folder):
    """Every packed weight of a folder by the definition, [O, I]."""
    found = tensors(folder)
    return {
        name: QuantizedWeight.from_tensors(
            module.format, {part: found[f"{name}.{part}"] for part in module.format.shapes(module.rows, module.columns)}
        ).dequantize(torch.bfloat16)
        for name, module in read_modules(folder).items()
    }


def assert_fused(twin, experts):
    for layer in LAYERS:
        gate_up, down = twin[f"{layer}.gate_up_proj"], twin[f"{layer}.down_proj"]
        assert gate_up.shape == (EXPERTS, HIDDEN, 2 * INNER) and down.shape == (EXPERTS, INNER, HIDDEN)
        for expert in range(EXPERTS):
            assert torch.equal(gate_up[expert, :, :INNER].T, experts[f"{layer}.{expert}.gate_proj"])
            assert torch.equal(gate_up[expert, :, INNER:].T, experts[f"{layer}.{expert}.up_proj"])
            assert torch.equal(down[expert].T, experts[f"{layer}.{expert}.down_proj"])


def test_experts_are_fused_again(mixture, tmp_path):
    source, packed = mixture
    dequantize(packed, tmp_path / "twin")
    twin, original, expected = tensors(tmp_path / "twin"), tensors(source), weights(packed)
    assert {name: tensor.shape for name, tensor in twin.items()} == {n: t.shape for n, t in original.items()}
    assert_fused(twin, expected)
    others = {name: weight for name, weight in expected.items() if ".experts." not in name}
    assert others and all(torch.equal(twin[f"{name}.weight"], weight) for name, weight in others.items())
    _, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "twin", output_loading_info=True)
    assert not any(told.values()), told


def test_parts_in_several_files(packed, tmp_path):
    """Experts of one layer, and the parts of one weight, in different files; each tensor is written once."""
    expected, names = weights(packed), sorted(tensors(packed))
    found = tensors(packed)
    (packed / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: found[name] for name in names if weight_map[name] == file}, packed / file, {"format": "pt"})
    (packed / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    dequantize(packed, tmp_path / "twin")
    assert_fused(tensors(tmp_path / "twin"), expected)
    index = json.loads((tmp_path / "twin" / INDEX).read_text())["weight_map"]
    assert sum(len(load_file(path)) for path in (tmp_path / "twin").glob("*.safetensors")) == len(index)


OLD = f"{LAYERS[0]}.3.up_proj"


@pytest.mark.parametrize("new", [None, f"{LAYERS[0]}.6.up_proj", f"{LAYERS[0]}.03.up_proj"])
def test_lost_expert(new, packed, tmp_path):
    """Gone, or there under another number."""
    found = tensors(packed)
    parts = {part: found.pop(f"{OLD}.{part}") for part in PARTS if f"{OLD}.{part}" in found}
    config = json.loads((packed / "config.json").read_text())
    format = config["quantization_config"]["overrides"].pop(OLD)
    if new:
        found |= {f"{new}.{part}": tensor for part, tensor in parts.items()}
        config["quantization_config"]["overrides"][new] = format
    save(packed, found, config)
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts.3.up_proj is not packed, others are"):
        dequantize(packed, tmp_path / "twin")
    assert not list(tmp_path.glob("*twin*"))


def save(folder, found, config=None):
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def test_router_decides(packed, tmp_path):
    """Experts that it does not know are too many, none can be told without it."""
    found, router = tensors(packed), f"{LAYERS[0].removesuffix('.experts')}.gate.weight"
    save(packed, found | {router: found[router][:5].clone()})
    with pytest.raises(CheckpointError, match=r"experts.5.down_proj is one too many: the router has 5"):
        dequantize(packed, tmp_path / "twin")
    del found[router]
    save(packed, found)
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts has no router beside it"):
        dequantize(packed, tmp_path / "twin")


def test_shapes_differ(packed, tmp_path):
    """As many experts, of which one is narrower."""
    found, name = tensors(packed), f"{LAYERS[1]}.4.down_proj"
    format = read_modules(packed)[name].format
    narrow = QuantizedWeight(
        format,
        torch.zeros(HIDDEN, 64, dtype=torch.uint8),
        torch.ones(HIDDEN, format.groups(64), dtype=torch.bfloat16),
        None if format.symmetric else torch.zeros(HIDDEN, format.groups(64), dtype=torch.uint8),
    )
    save(packed, found | {f"{name}.{part}": tensor for part, tensor in narrow.tensors().items()})
    with pytest.raises(CheckpointError, match=r"experts.4.down_proj has another shape than"):
        dequantize(packed, tmp_path / "twin")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_other_tools_checkpoints_come_back_as_their_makers_read_them(name, tmp_path):
    """Rounded once to the dtype of their scales; everything else stays."""
    restore(name, tmp_path / "packed")
    dequantize(tmp_path / "packed", tmp_path / "twin")
    before, after = tensors(tmp_path / "packed"), tensors(tmp_path / "twin")
    packed = {key.rpartition(".")[0] for key in before if key.endswith((".qweight", ".weight_packed"))}
    weights = {module: after.pop(f"{module}.weight") for module in packed}
    for module, weight in expected(name).items():
        twin = weights[module]
        rounding = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[twin.dtype]
        torch.testing.assert_close(twin, weight.to(twin.dtype), rtol=rounding, atol=0)
    kept = {key for key in before if key.rpartition(".")[0] not in packed or key.endswith(".bias")}
    assert after.keys() == kept and all(torch.equal(after[key], before[key]) for key in kept)
    assert "quantization_config" not in json.loads((tmp_path / "twin/config.json").read_text())
    assert not [*(tmp_path / "twin").glob("quant*_config.json"), *(tmp_path / "twin").glob("recipe.yaml")]


def test_methods_that_nobody_reads_here_are_named(packed, tmp_path):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the model is quantised with 'fp8'; vlmq reads vlmq, gptq, "):
        dequantize(packed, tmp_path / "twin")
