"""`from_pretrained` of a vlmq checkpoint in transformers: weights and answers of the dequantised twin, bit by bit."""

import json
import logging
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from family_models import FAMILIES, build
from family_samples import asked_of
from mixed_formats import quantize_mixed
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.import_hook import after_import
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

MIXTURE = "qwen3_vl_moe"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, quantised folder, its twin in 16 bits)."""
    return request.param, *written(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Files and memory have other names in this family."""
    return written("llava", tmp_path_factory.mktemp("llava"))


def written(name, folder):
    build(name, folder / "model")
    quantize_mixed(folder / "model", folder / "packed")
    dequantize(folder / "packed", folder / "twin")
    return folder / "packed", folder / "twin"


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)


def assert_same_weights(model, twin):
    found, expected = model.state_dict(), twin.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_weights_are_those_of_the_twin(family):
    model, info = load(family[1])
    twin, expected = load(family[2])
    assert info == expected
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(model, twin)
    assert len({str(parameter.device) for parameter in model.parameters()}) == 1


@torch.inference_mode()
def test_logits_are_those_of_the_twin(family):
    name, packed, twin = family
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor spells numbers with the package num2words")
    asked = asked_of(packed).to(torch.bfloat16)
    logits = load(packed)[0](**asked).logits
    assert torch.equal(logits, load(twin)[0](**asked).logits)
    original = AutoModelForImageTextToText.from_pretrained(packed.with_name("model"))
    assert not torch.equal(logits, original(**asked).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_another_dtype_than_that_of_the_files(llava, dtype):
    """What has another name in memory than in the file, too."""
    model, _ = load(llava[0], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_same_weights(model, load(llava[1], dtype=dtype)[0])


def test_saved_model_is_an_ordinary_one(family, tmp_path):
    _, packed, twin = family
    load(packed)[0].save_pretrained(tmp_path / "packed")
    load(twin)[0].save_pretrained(tmp_path / "twin")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    assert config == json.loads((tmp_path / "twin/config.json").read_text())
    assert "quantization_config" not in config
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "twin"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_model_without_head_loads(llava):
    model = AutoModel.from_pretrained(llava[0])
    assert_same_weights(model, AutoModel.from_pretrained(llava[1]))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (r"layers\.0\.mlp\.down_proj\.weight_scale", "layers.0.mlp.down_proj.weight_scale is missing"),
        (r"layers\.0\.self_attn\.k_proj\.weight_.*", "layers.0.self_attn.k_proj.weight is in no file"),
        (r"language_model\.model\.norm\.weight", "model.language_model.norm.weight is in no file"),
    ],
)
def test_damaged_checkpoint_is_refused(llava, tmp_path, lost, message):
    folder = shutil.copytree(llava[0], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(lost + "$", name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    overrides = config["quantization_config"]["overrides"]
    modules = {name.rpartition(".")[0] for name in kept if name.endswith("weight_packed")}
    config["quantization_config"]["overrides"] = {name: overrides[name] for name in overrides if name in modules}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("layers.1.mlp.experts.6.up_proj", r"do not make up transformers' .*layers.1.mlp.experts.gate_up_proj"),
        ("layers.1.mlp.surplus.up_proj", r"surplus.up_proj is packed, but .*has no .*surplus.up_proj.weight"),
    ],
    ids=["missing expert", "surplus module"],
)
def test_surplus_module_and_missing_expert_are_refused(tmp_path, new, message):
    packed, _ = written(MIXTURE, tmp_path)
    old = "layers.1.mlp.experts.3.up_proj"
    tensors = load_file(packed / "model.safetensors")
    save_file({name.replace(old, new): t for name, t in tensors.items()}, packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    overrides = config["quantization_config"]["overrides"]
    moved = {name.replace(old, new): format for name, format in overrides.items()}
    config["quantization_config"]["overrides"] = moved
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(packed)


@pytest.mark.parametrize("first", ["vlmq_vllm", "transformers.quantizers.auto", "vlmq_vllm.huggingface"])
def test_either_may_be_imported_first(llava, first):
    program = (
        "import sys\n"
        "import vlmq_vllm\n"
        "heavy = {'torch', 'vllm', 'triton', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        if first == "vlmq_vllm"
        else f"import {first}, sys\nimport vlmq_vllm\n"
    )
    program += (
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(llava[0])!r})\n"
        "import torch\n"
        "torch.save(model.state_dict(), sys.argv[1])\n"
    )
    out = llava[0].parent / "state.pt"
    subprocess.run([sys.executable, "-c", program, str(out)], check=True, timeout=300)
    expected = load(llava[1])[0].state_dict()
    found = torch.load(out, weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_methods_are_as_before():
    """vlmq adds one entry to each of transformers' two tables."""
    from transformers.quantizers import auto

    from vlmq_vllm.huggingface import VLMQQuantizer, VLMQTransformersConfig

    names = [name for name, kind in auto.AUTO_QUANTIZER_MAPPING.items() if kind is VLMQQuantizer]
    configs = [n for n, kind in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items() if kind is VLMQTransformersConfig]
    assert names == configs == ["vlmq"]
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "vlmq_vllm.import_hook"]


def test_hook_calls_once_and_never_raises(tmp_path, monkeypatch, caplog):
    (tmp_path / "late_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def action():
        seen.append(sys.modules["late_module"].value)
        raise RuntimeError("broken")

    after_import("late_module", action)
    assert seen == []
    with caplog.at_level(logging.ERROR):
        import late_module

        assert late_module.value == 3
    assert seen == [3]
    assert "vlmq could not register with transformers" in caplog.text
    after_import("late_module", action)
    assert seen == [3, 3]
    monkeypatch.delitem(sys.modules, "late_module")
