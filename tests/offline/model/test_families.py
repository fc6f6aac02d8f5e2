"""Every family of `offline/model/families.py`, on tiny random models of its real classes: quantised at mixed widths,
written, verified.

The replay check, which compares the layer-by-layer forward with the model's own, runs in every one of these.
"""

import functools
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from family_models import FAMILIES, build
from vlmq_vllm.errors import RefusedError, StoppedError
from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.offline.checkpoint.verify import verify
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.inputs import load_processor, model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.model import families
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import find_targets, find_units
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings

CPU = torch.device("cpu")
VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "internvl")
# What vLLM has no place for, by component, with a part of the reason.
UNSERVED = {
    "llava_onevision": {"vision": "no multiple of 64", "connector": "plain nn.Linear"},
    "internvl": {"vision": "without a quantisation config", "connector": "plain nn.Linear"},
    "gemma3": {"vision": "no multiple of 64", "connector": "no linear layer"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, chats):
    """(name, folder of the model, calibration file)."""
    return request.param, *chats(request.param)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """By name: folder of a model and calibration file with pictures of two sizes, two at once, none, and a video."""
    return functools.cache(lambda name: _written(name, tmp_path_factory.mktemp(name)))


def _written(name, folder):
    build(name, folder / "model")
    lines = []
    for i in range(8):
        image = Image.effect_noise((56 + 28 * (i % 2), 56), 64).convert("RGB")
        image.save(folder / f"{i}.png")
        seen = [{"type": "image", "image": f"{i}.png"}] * {3: 2, 5: 0}.get(i, 1)
        if i == 6 and name in VIDEO:
            seen = [{"type": "video", "video": ["0.png", "2.png", "4.png", "0.png"]}]
        asked = [*seen, {"type": "text", "text": f"What is this {i}?"}]
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": "noise" * (i % 3 + 1)}]
        lines.append(json.dumps({"messages": chat}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "model", folder / "chats.jsonl"


def test_there_is_a_tiny_model_of_every_row():
    assert set(FAMILIES) == set(families.FAMILIES)


def test_decoder_with_saliency_on_gptaq(family, tmp_path):
    name, model, data = family
    rows = quantize(str(model), tmp_path / "out", data, Settings(bits=3, group_size=32, base="gptaq", damp=0.1))
    found = verify(tmp_path / "out").modules
    assert found.keys() == {row.module for row in rows}
    weights = load_file(model / "model.safetensors")
    decoder = {
        module
        for module in found
        if "language_model" in module or module.startswith(("model.layers.", "model.text_model."))
    }
    assert decoder == found.keys()
    experts = name == "qwen3_vl_moe"
    # three layers of seven linears; in the mixture two of them have six experts of three instead of one MLP
    assert len(found) == (3 * 4 + 3 + 2 * 6 * 3 if experts else 3 * 7)
    tokens = {row.module.rpartition("layers.")[2]: row.tokens for row in rows}
    assert tokens["1.self_attn.q_proj"] == "saliency" and tokens["0.self_attn.q_proj"] == "no signal"
    if not experts:
        assert all(f"{module}.weight" in weights for module in found)


def test_whole_model_at_mixed_widths(family, tmp_path):
    name, model, data = family
    connector = 16 if name == "gemma3" else 8
    settings = Settings(
        bits=2, group_size=64, vision_bits=4, connector_bits=connector, method="gptq", act_order="static", force=True
    )
    quantize(str(model), tmp_path / "out", data, settings)
    modules = verify(tmp_path / "out").modules
    widths = {module.format.bits for module in modules.values()}
    assert widths == ({2, 4} if connector == 16 else {2, 4, 8})
    vision = {name for name, module in modules.items() if module.format.bits == 4}
    assert vision and all("vis" in name for name in vision)
    blocks = {name.split("layers.")[-1].split("layer.")[-1].split("blocks.")[-1].split(".")[0] for name in vision}
    assert blocks == ({"0", "1"} if name == "llava" else {"0", "1", "2"})  # LLaVA-1.5 does not use its last block


def test_what_vllm_has_no_place_for_is_refused_with_the_reason(family, tmp_path):
    name, model, data = family
    for component in ("vision", "connector"):
        settings = Settings(method="rtn", group_size=32, **{f"{component}_bits": 4})
        reason = UNSERVED.get(name, {}).get(component)
        if reason is None:
            quantize(str(model), tmp_path / component, None, settings)
            continue
        with pytest.raises(RefusedError, match=reason):
            quantize(str(model), tmp_path / component, None, settings)
    assert {path.name for path in tmp_path.iterdir()} == {"vision", "connector"} - UNSERVED.get(name, {}).keys()


def test_expert_weights_are_those_of_the_fused_tensors(tmp_path):
    """Four bits, groups of 8: what is written for expert e is slice e of the published tensors."""
    build("qwen3_vl_moe", tmp_path / "model")
    quantize(
        str(tmp_path / "model"), tmp_path / "out", None, Settings(bits=4, group_size=8, method="rtn", symmetric=False)
    )
    stored = {n: t for path in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(path).items()}
    fused = load_file(tmp_path / "model/model.safetensors")
    modules = verify(tmp_path / "out").modules
    prefix = "model.language_model.layers.1.mlp.experts"
    gate_up, down = (fused[f"{prefix}.{part}"].float() for part in ("gate_up_proj", "down_proj"))
    inner = gate_up.shape[2] // 2
    for part, expected in {
        "gate_proj": gate_up[4, :, :inner].T,
        "up_proj": gate_up[4, :, inner:].T,
        "down_proj": down[4].T,
    }.items():
        module = f"{prefix}.4.{part}"
        parts = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        weight = QuantizedWeight.from_tensors(modules[module].format, parts).dequantize()
        # half a step of a range of eight weights in 15 steps; another expert's would be off by more than 100 %
        assert (weight - expected).norm() / expected.norm() < 0.1
    assert f"{prefix}.gate_up_proj" not in stored and "model.language_model.layers.1.mlp.gate.weight" in stored


def test_skeletons_buffers_are_those_of_the_loaded_model(family):
    from transformers import AutoModelForImageTextToText

    loaded = dict(AutoModelForImageTextToText.from_pretrained(family[1], dtype=torch.float32).named_buffers())
    skeleton = dict(Source(family[1]).model.named_buffers())
    assert loaded.keys() == skeleton.keys()
    assert all(torch.equal(loaded[name], skeleton[name]) for name in loaded)


def test_batches_of_equal_length_give_what_single_samples_give(family):
    _, model, data = family
    source = Source(model)
    inputs = [inputs for _, inputs in model_inputs(read_chats(data, 0), load_processor(model), 8, 2048)]
    batches = batched(inputs)
    assert len(batches) < len(inputs) and sum(len(batch["input_ids"]) for batch in batches) == len(inputs)
    together = capture(source, source.family.layers, batches, CPU)
    alone = capture(source, source.family.layers, [{**sample} for sample in inputs], CPU)
    by_ids = {tuple(sample["input_ids"][0].tolist()): stream for sample, stream in zip(inputs, alone, strict=True)}
    layer = source.materialise(f"{source.family.layers}.0", CPU)
    with torch.no_grad():
        for batch, stream in zip(batches, together, strict=True):
            out = stream.run(layer, 0)
            for i, ids in enumerate(batch["input_ids"].tolist()):
                # float32 on other shapes of the same products; values are of the order of 1
                torch.testing.assert_close(out[i], by_ids[tuple(ids)].run(layer, 0)[0], rtol=1e-4, atol=1e-4)


def test_deepstack_terms_are_caught_between_the_layers(tmp_path):
    """Qwen3-VL adds features of the tower after its first layers, at the pictures' tokens and nowhere else."""
    build("qwen3_vl", tmp_path / "model")
    image = Image.effect_noise((56, 56), 64).convert("RGB")
    image.save(tmp_path / "0.png")
    part = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": part}]}))
    source = Source(tmp_path / "model")
    ((_, inputs),) = model_inputs(read_chats(tmp_path / "c.jsonl", 0), load_processor(tmp_path / "model"), 1, 2048)
    (stream,) = capture(source, source.family.layers, [inputs], CPU)
    assert set(stream.terms) == {0, 1}
    pictured = inputs["input_ids"][0] == source.config["image_token_id"]
    for term in stream.terms.values():
        assert torch.equal(term[0].abs().sum(-1) > 0, pictured)


def test_units_of_a_mixture_leave_the_router_alone(tmp_path):
    build("qwen3_vl_moe", tmp_path / "model")
    source = Source(tmp_path / "model")
    units = find_units(source, Settings())
    assert len(units) == 3
    names = {target.name for target in find_targets(source, Settings(group_size=32), units)}
    assert "model.language_model.layers.1.mlp.experts.5.down_proj" in names
    assert "model.language_model.layers.1.mlp.gate.weight" in source.model.state_dict()
    assert "model.language_model.layers.1.mlp.gate" not in names


@pytest.mark.parametrize(("name", "base", "after"), [("qwen2_vl", "gptaq", 2), ("qwen3_vl_moe", "qep", 5)])
def test_a_run_stopped_in_the_tower_or_the_decoder_goes_on_to_the_same_bytes(name, base, after, chats, tmp_path):
    """Units: three blocks of the tower, the connectors, three layers."""
    folder, data = chats(name)
    settings = Settings(bits=3, group_size=32, vision_bits=4, connector_bits=4, base=base, damp=0.1, force=True)
    quantize(str(folder), tmp_path / "whole", data, settings)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > after

    with pytest.raises(StoppedError):
        quantize(str(folder), tmp_path / "parts", data, settings, stop=stop)
    assert len(list((tmp_path / ".parts.partial").glob("*.safetensors"))) == after
    with pytest.raises(RefusedError, match="vision_bits 4, this one has 16"):
        quantize(str(folder), tmp_path / "parts", data, replace(settings, vision_bits=16), resume=True)
    quantize(str(folder), tmp_path / "parts", data, settings, resume=True)
    assert (tmp_path / "parts/SHA256SUMS").read_text() == (tmp_path / "whole/SHA256SUMS").read_text()
