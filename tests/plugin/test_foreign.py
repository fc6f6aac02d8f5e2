"""Other quantisers' checkpoints, as their packages wrote them (tests/foreign), against their dequantised weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreign_checkpoints import NAMES, expected, read, restore, weight_of
from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.foreign.gptq import GPTQPacking
from vlmq_vllm.format import QuantizedWeight, WeightFormat, pack
from vlmq_vllm.headers import read_config, read_headers

REFUSED = {"gptq-desc-act": "act-order", "packed-actorder": "actorder 'group'"}
SERVED = [name for name in NAMES if name not in REFUSED]


@pytest.mark.parametrize("name", SERVED)
def test_weights_are_those_that_the_peer_unpacks(name, tmp_path):
    folder = tmp_path / name
    restore(name, folder)
    packing, modules = read(folder)
    headers = read_headers(folder)
    owners = {key.rpartition(".")[0] for key in headers if key.endswith((".qweight", ".weight_packed"))}
    assert modules.keys() == owners and owners
    for module, weight in expected(name).items():
        found = weight_of(folder, module, packing, modules[module])
        assert torch.equal(found.dequantize(torch.float32), weight.float()), module


@pytest.mark.parametrize("name", REFUSED)
def test_other_orders_of_columns_are_refused(name, tmp_path):
    restore(name, tmp_path / name)
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        read(tmp_path / name)


def test_symmetric_weights_are_recognised_by_their_zero_points(tmp_path):
    for name in ("gptq-4bit-g64", "gptq-4bit-asym"):
        restore(name, tmp_path / name)
        _, modules = read(tmp_path / name)
        assert {info.format.symmetric for info in modules.values()} == {name == "gptq-4bit-g64"}


def test_zero_point_of_zero_borrows_from_its_neighbour_in_version_1():
    zeros = torch.tensor([[0, 5, 15, 0, 0, 1, 7, 8]], dtype=torch.uint8)
    stored = pack(zeros, 4) - 0x11111111
    assert torch.equal(GPTQPacking(1).zeros(stored, 4, 8), pack(zeros, 4).T)


CHANGES = [
    ("gptq-4bit-g64", {"checkpoint_format": "gptq_v2"}, r"qzeros are stored as version 1 does it, .* says version 2"),
    (
        "gptq-4bit-g64",
        {"checkpoint_format": "marlin"},
        "packed as 'marlin'; of gptq's packings vlmq reads gptq, gptq_v2",
    ),
    ("gptq-4bit-g64", {"bits": "4"}, "quantization_config has bits '4'"),
    ("gptq-4bit-g64", {"group_size": 48}, "groups for .* columns; of config.json's groups of 48 none fits"),
    ("packed-3bit-tens", {"kv_cache_scheme": {"num_bits": 8}}, "quantises the KV cache"),
    ("packed-3bit-tens", {"config_groups": {}}, "has no config_groups"),
    ("packed-3bit-tens", {"transform_config": {"config_groups": {}}}, "transforms activations"),
    ("gptq-4bit-g64", {"checkpoint_format": ["gptq"]}, r"packed as \['gptq'\]"),
    ("gptq-4bit-g64", {"bits": 0}, "quantization_config has bits 0; vlmq reads 2, 3, 4, 8 bits"),
    ("gptq-4bit-g64", {"dynamic": {"+:x": {"group_size": 120}}}, "groups of 64, 120 several fit"),
    ("round-2bit-asym-own", {"desc_act": True}, "g_idx is not the plain order of columns"),
    ("packed-3bit-tens", {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "channel"}}}}, "no format of"),
    (
        "packed-3bit-tens",
        {"config_groups": {"a": {"weights": {"num_bits": 5, "strategy": "group"}}}},
        "5 bits by group",
    ),
    (
        "packed-3bit-tens",
        {"config_groups": {"a": {"weights": {"num_bits": 3}, "input_activations": {"num_bits": 8}}}},
        "quantises activations",
    ),
    ("packed-3bit-tens", {"format": "nvfp4-pack-quantized", "config_groups": {"a": {"weights": {}}}}, "nvfp4-pack"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES, ids=[message for *_, message in CHANGES])
def test_configuration_that_cannot_be_served_is_refused(name, change, message, tmp_path):
    restore(name, tmp_path / name)
    config = read_config(tmp_path / name)
    config["quantization_config"] |= change
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gptq-3bit-g32", lambda t, m: t.pop(f"{m}.scales"), r"scales is missing"),
        ("gptq-3bit-g32", lambda t, m: t.update({f"{m}.scales": t[f"{m}.scales"].int()}), r"scales is I32"),
        ("gptq-3bit-g32", lambda t, m: t.update({f"{m}.scales": t[f"{m}.scales"][:, 1:].clone()}), r"scales has shape"),
        ("gptq-3bit-g32", lambda t, m: t.update({f"{m}.qzeros": t[f"{m}.qzeros"][:, 1:].clone()}), r"none of 2, 3, 4"),
        (
            "gptq-3bit-g32",
            lambda t, m: t.update({f"{m}.qweight": t[f"{m}.qweight"][1:].clone()}),
            r"qweight has 5 rows, no whole number of 3-bit",
        ),
        ("gptq-3bit-g32", lambda t, m: t.update({f"{m}.weight": torch.zeros(1)}), "weight is one too many"),
        ("packed-3bit-tens", lambda t, m: t.update({f"{m}.weight": torch.zeros(1)}), "weight is one too many"),
        ("packed-3bit-tens", lambda t, m: t.pop(f"{m}.weight_shape"), "weight_shape is missing"),
        (
            "packed-3bit-tens",
            lambda t, m: t.update({f"{m}.weight_packed": t[f"{m}.weight_packed"][:, 2:].clone()}),
            r"weight_packed \[.*; no format of config.json fits",
        ),
    ],
)
def test_damaged_tensors_are_named(name, damage, message, tmp_path):
    restore(name, tmp_path / name)
    path = tmp_path / name / "model.safetensors"
    tensors = load_file(path)
    module = next(key for key in sorted(tensors) if key.endswith((".qweight", ".weight_packed"))).rpartition(".")[0]
    damage(tensors, module)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{module}.*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize("group_size", [-1, 96, 128])
def test_weights_of_one_group_are_read_by_row(group_size, tmp_path):
    """Whatever config.json calls the group of all columns."""
    weight = QuantizedWeight(
        WeightFormat(4, -1, False),
        torch.randint(0, 16, (8, 96), dtype=torch.uint8),
        torch.rand(8, 1).half(),
        torch.randint(0, 16, (8, 1), dtype=torch.uint8),
    )
    tensors = {
        "fc.qweight": pack(weight.codes, 4).T.contiguous(),
        "fc.scales": weight.scale.T.contiguous(),
        "fc.qzeros": pack(weight.zero.T.contiguous(), 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": group_size}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    packing, modules = read(tmp_path)
    assert modules == {"fc": ModuleInfo(weight.format, 8, 96)}
    found = weight_of(tmp_path, "fc", packing, modules["fc"])
    assert torch.equal(found.dequantize(), weight.dequantize())
