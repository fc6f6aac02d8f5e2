"""Exports read back by others: compressed-tensors' own package, and GPTQ's layout unpacked by its description."""

import json
import re

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from family_models import build
from mixed_formats import quantize_mixed
from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.checkpoint.export.export import export

# Alike in what engines fuse; 208 columns of down_proj hold no whole groups of 32.
KINDS = {
    r"language_model.*self_attn\.[qkv]_proj": WeightFormat(4, 32, True),
    r"language_model.*self_attn\.o_proj": WeightFormat(2, 64, False),
    r"language_model.*mlp\.(gate|up)_proj": WeightFormat(8, 32, False),
    r"language_model.*mlp\.down_proj": WeightFormat(4, -1, False),
    r"(vision_tower|visual).*(self_attn\.[qkv]_proj|attn\.qkv)": WeightFormat(8, -1, True),
    r"(vision_tower|visual).*fc1": WeightFormat(2, 32, True),
}


def of_kind(index, name):
    return next((format for pattern, format in KINDS.items() if re.fullmatch(f"model.{pattern}", name)), None)


def everything(files):
    return {name: tensor for path in files.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(params=["qwen2_vl", "llava", "gemma3"])
def checkpoint(request, tmp_path):
    """A family whose names in files differ from those in memory, and one that ties its head."""
    build(request.param, tmp_path / "model")
    # transformers 5.19 initialises the linears of SigLIP's tower before they are loaded, and fails where one is packed
    siglip = request.param == "gemma3"
    quantize_mixed(
        tmp_path / "model", tmp_path / "packed", lambda i, n: None if siglip and "vision" in n else of_kind(i, n)
    )
    return tmp_path / "packed"


def test_compressed_tensors_dequantises_to_the_twin(checkpoint, tmp_path):
    told = export(checkpoint, tmp_path / "out", "compressed-tensors")
    assert told.startswith("transformers 5.23 and 5.24 take all its layers for the first one's format")
    before, after = everything(checkpoint), everything(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if Version(transformers.__version__) >= Version("5.23"):
        pytest.skip("transformers 5.23 and later take all layers for the first group's format")
    dequantize(checkpoint, tmp_path / "twin")
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    found = model.state_dict()
    twin = AutoModelForImageTextToText.from_pretrained(tmp_path / "twin").state_dict()
    for name, tensor in twin.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def decoder(demo_model, tmp_path_factory):
    """The demo model, its decoder at all widths on both grids, for readers of GPTQ."""
    formats = [
        WeightFormat(bits, group, symmetric)
        for bits, group in ((3, 32), (4, 64), (2, -1), (8, 32), (3, -1))
        for symmetric in (True, False)
    ]

    def choose(index, name):
        return formats[index % len(formats)] if ".layers." in name else None

    out = tmp_path_factory.mktemp("decoder") / "packed"
    quantize_mixed(demo_model, out, choose)
    (path,) = out.glob("*.safetensors")
    tensors = load_file(path)
    zero_points = next(tensor for name, tensor in sorted(tensors.items()) if name.endswith("weight_zero_point"))
    zero_points[0] = 0  # as a group of positive weights has it; version 1 could not hold it
    save_file(tensors, path, {"format": "pt"})
    return out


def codes(words, bits):
    """Codes [32 n, ...] of `words` [bits * n, ...] as AutoGPTQ lays them: word by word, but for 3 bits three by three.

    There codes 10 and 21 of 32 lie across words: two low bits in the first, one in the second; then one and two.
    """
    words = words.long() & 0xFFFFFFFF
    if bits != 3:
        return torch.cat([(word >> torch.arange(0, 32, bits)[:, None]) & (1 << bits) - 1 for word in words])
    found = []
    for first, second, third in words.unflatten(0, (-1, 3)):
        found += [(first >> 3 * i) & 7 for i in range(10)]
        found.append((first >> 30) & 3 | (second & 1) << 2)
        found += [(second >> 3 * i + 1) & 7 for i in range(10)]
        found.append((second >> 31) & 1 | (third & 3) << 1)
        found += [(third >> 3 * i + 2) & 7 for i in range(10)]
    return torch.stack(found)


def in_memory(name):
    """The name that transformers gives to a module or tensor of the demo model."""
    return re.sub(
        r"^model\.(?!language_model|visual)", "model.language_model.", re.sub("^visual", "model.visual", name)
    )


def rule_of(dynamic, name):
    """The first rule that matches, as GPTQModel looks it up; False for a module that is left alone."""
    for rule, fields in dynamic.items():
        if re.match(rule[2:], name):
            return False if rule.startswith("-:") else fields
    return {}


def read_gptq(folder):
    """Weight [O, I] of every module, from the tensors and the header alone."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = everything(folder)
    weights = {}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        fields = config | rule_of(config["dynamic"], module)
        part = {p: tensors[f"{module}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
        q = codes(part["qweight"], fields["bits"])
        zeros = codes(part["qzeros"].T, fields["bits"]).T + (config["checkpoint_format"] == "gptq")
        if fields["sym"]:
            assert (zeros == 1 << fields["bits"] - 1).all()
        group = part["g_idx"].long()
        size = q.shape[0] if fields["group_size"] == -1 else fields["group_size"]
        assert torch.equal(group, torch.arange(q.shape[0]) // size)
        weight = part["scales"].float()[group] * (q - zeros[group]).float()
        weights[f"{module}.weight"] = weight.T.to(part["scales"].dtype)
    return weights


def test_gptq_dequantises_to_the_twin(decoder, tmp_path):
    note = export(decoder, tmp_path / "out", "gptq")
    assert "gptq_v2" in note
    dequantize(decoder, tmp_path / "twin")
    expected = {in_memory(name): tensor for name, tensor in everything(tmp_path / "twin").items()}
    found = read_gptq(tmp_path / "out")
    assert found.keys() == {f"{in_memory(module)}.weight" for module in read_modules(decoder)}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert rule_of(config["dynamic"], "lm_head") is False
    assert rule_of(config["dynamic"], "model.visual.blocks.0.mlp.fc1") is False
    for module in read_modules(decoder):  # both names have the same rules
        assert rule_of(config["dynamic"], in_memory(module)) == rule_of(config["dynamic"], module)


def test_symmetric_gptq_is_of_version_1(demo_model, tmp_path):
    quantize_mixed(
        demo_model, tmp_path / "packed", lambda i, name: WeightFormat(4, 64, True) if ".layers." in name else None
    )
    assert export(tmp_path / "packed", tmp_path / "out", "gptq") == ""
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq"
    assert all(rule.startswith("-:") for rule in config["dynamic"])
    dequantize(tmp_path / "packed", tmp_path / "twin")
    expected = {in_memory(name): tensor for name, tensor in everything(tmp_path / "twin").items()}
    found = read_gptq(tmp_path / "out")
    plain = {name: t for name, t in everything(tmp_path / "out").items() if in_memory(name) in expected}
    assert found.keys() | plain.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.items())
    assert found and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("target", "changed", "message"),
    [
        (
            "compressed-tensors",
            {"q_proj": (3, 32, True)},
            "[kv]_proj has 4 bits .*q_proj has 3 bits.*quantise them alike",
        ),
        ("compressed-tensors", {"q_proj": None}, "proj has 4 bits .*q_proj has 16 bits"),
        ("compressed-tensors", {"down_proj": (4, 64, True)}, "down_proj has 208 columns in groups of 64"),
        ("gptq", {"down_proj": (4, 64, True)}, "down_proj has 208 columns in groups of 64"),
        ("gptq", {}, "is 128 x 208, and gptq has whole words of 32 codes only"),
        (
            "gptq",
            {"fc1": (4, 32, True)} | dict.fromkeys(("gate_proj", "up_proj", "down_proj")),
            "fc1 lies outside the decoder's layers.*--vision-bits 16",
        ),
    ],
)
def test_what_the_target_cannot_hold_is_refused(tmp_path, target, changed, message):
    build("qwen2_vl", tmp_path / "model")

    def choose(index, name):
        leaf = name.rpartition(".")[2]
        if leaf in changed:
            return WeightFormat(*changed[leaf]) if changed[leaf] else None
        return WeightFormat(4, -1, True) if "language_model" in name else None

    quantize_mixed(tmp_path / "model", tmp_path / "packed", choose)
    with pytest.raises(RefusedError, match=message):
        export(tmp_path / "packed", tmp_path / "out", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "packed"]


def test_experts_are_refused(tmp_path):
    build("qwen3_vl_moe", tmp_path / "model")
    quantize_mixed(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(RefusedError, match="is an expert of a mixture, which cannot be exported yet"):
        export(tmp_path / "packed", tmp_path / "out", "compressed-tensors")


def test_command(decoder, tmp_path, vlmq):
    code, out, _ = vlmq("export", decoder, "-o", tmp_path / "out", "--format", "gptq")
    assert code == 0 and out.startswith(
        f"{tmp_path / 'out'}: the same codes as gptq; zero points as in checkpoint_format gptq_v2"
    )
    code, _, errors = vlmq("export", decoder, "-o", tmp_path / "other", "--format", "awq")
    assert code == 2 and errors == ["vlmq: error: --format is 'awq'; it must be compressed-tensors or gptq"]
    with pytest.raises(QuantizeError, match="exists already"):
        export(decoder, tmp_path / "out", "gptq")


def test_dense_3_bit_weights_say_what_reads_them(tmp_path):
    build("qwen2_vl", tmp_path / "model")
    quantize_mixed(
        tmp_path / "model", tmp_path / "packed", lambda i, name: WeightFormat(3, -1, True) if "mlp" in name else None
    )
    assert "3-bit weights need compressed-tensors 0.18" in export(
        tmp_path / "packed", tmp_path / "out", "compressed-tensors"
    )
