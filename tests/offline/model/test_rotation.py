"""Turned models: the same logits before rounding for every family, and runs that are stopped, mixed and refused."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import family_models
from family_samples import CPU, make_samples, streams_of
from vlmq_vllm.errors import RefusedError, StoppedError
from vlmq_vllm.headers import read_headers
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.checkpoint.verify import verify
from vlmq_vllm.offline.methods.saliency.answer_loss import backward
from vlmq_vllm.offline.model import rotation
from vlmq_vllm.offline.model.rotation import random_orthogonal
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.plan.make import make_plan
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings

TURNED = [name for name in family_models.FAMILIES if name != "gemma3"]


def widened(name, folder):
    """The samples and the folder of a family's model in float32, with scales of norms that are not 1. Every token goes
    to all experts: which of two random ones is the better is decided by the last bit now and then."""
    _, _, samples = make_samples(name, folder)
    path = folder / "model/model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    norms = {name: t * (1 + 0.3 * torch.randn_like(t)) for name, t in tensors.items() if name.endswith("norm.weight")}
    save_file(tensors | norms, path, {"format": "pt"})
    config = json.loads((folder / "model/config.json").read_text())
    if "num_local_experts" in config["text_config"]:
        config["text_config"]["num_experts_per_tok"] = config["text_config"]["num_local_experts"]
        (folder / "model/config.json").write_text(json.dumps(config))
    return samples, folder / "model"


def written(source, out):
    """The source as a folder of its own, tensor by tensor."""
    out.mkdir()
    tensors = {name: source.read(name).contiguous() for name in source.headers}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(source.config))
    return out


@torch.no_grad()
def logits(folder, batch):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model(**batch).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_matrices_are_orthogonal_and_follow_the_seed():
    first, again, other = (random_orthogonal(96, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first @ first.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_large_tables_are_turned_in_parts(tmp_path, monkeypatch):
    family_models.build("qwen2_vl", tmp_path / "model")
    source = Source(tmp_path / "model")
    source.rotate(0, CPU)
    whole = [source.parameter(name) for name in (rotation.HEAD, f"{source.family.embed}.weight")]
    monkeypatch.setattr(rotation, "ROWS", 100)
    parts = [source.parameter(name) for name in (rotation.HEAD, f"{source.family.embed}.weight")]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-4)  # a last bit of bfloat16, by the order of sums


@pytest.mark.parametrize("name", TURNED)
def test_a_turned_model_is_the_same_model(name, tmp_path):
    """float32 logits within 1e-4, with pictures, DeepStack, experts and tied heads; every matrix has moved."""
    samples, folder = widened(name, tmp_path)
    before, source = Source(folder), Source(folder)
    source.rotate(3, CPU)
    turned = written(source, tmp_path / "turned")
    for sample in samples:
        assert_same(logits(turned, sample.inputs), logits(folder, sample.inputs))
    layer = f"{source.family.layers}.1"
    for inner, parameter in source.model.get_submodule(layer).named_parameters():
        own, turned_one = before.parameter(f"{layer}.{inner}"), source.parameter(f"{layer}.{inner}")
        moved = not torch.allclose(own, turned_one, atol=1e-3)
        assert moved == (parameter.ndim == 2 or "v_proj" in inner or "layernorm" in inner), inner


def test_a_decoder_with_norms_after_its_blocks_is_refused(tmp_path):
    family_models.build("gemma3", tmp_path / "model")
    with pytest.raises(RefusedError, match="gemma3 has post_attention_layernorm.weight in its layers"):
        Source(tmp_path / "model").rotate(0, CPU)


def test_a_norm_that_is_no_plain_rms_norm_is_refused(demo_model):
    source = Source(demo_model)
    for layer in source.layers():
        layer.input_layernorm = torch.nn.LayerNorm(256, bias=False, device="meta")
    with pytest.raises(RefusedError, match="input_layernorm that is no plain RMS norm"):
        source.rotate(0, CPU)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "llava_onevision", "smolvlm"])
def test_answers_cost_the_same_through_a_turned_decoder(name, tmp_path):
    """L and the size of its gradients, with what stands before the decoder as a run loads it: a pass that misses a
    turn of embeddings, newline, connector or DeepStack would answer otherwise."""
    samples, folder = widened(name, tmp_path)
    found = []
    for turned in (False, True):
        source = Source(folder)
        if turned:
            source.rotate(3, CPU)
        loss, gradients = backward(source, streams_of(source, samples), [sample.labels for sample in samples], CPU)
        found.append([torch.tensor(loss), *(gradient.norm(dim=-1) for gradient in gradients)])
    for one, other in zip(*found, strict=True):
        assert_same(other, one)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("stored", [False, True])
def test_tied_heads_are_untied_under_the_familys_name(name, stored, tmp_path):
    """Whether the files hold the tied head as well or not."""
    samples, folder = widened(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    embeddings = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    head = embeddings.replace("model.embed_tokens", "lm_head")
    tensors.pop(head, None)
    if stored:
        tensors[head] = tensors[embeddings].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = Source(folder)
    source.rotate(3, CPU)
    turned = written(source, tmp_path / "turned")
    config = json.loads((turned / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert head in read_headers(turned)
    assert_same(logits(turned, samples[1].inputs), logits(folder, samples[1].inputs))


@pytest.mark.parametrize("method", ["vlmq", *(pytest.param(m, marks=pytest.mark.slow) for m in ("rtn", "awq", "qvlm"))])
def test_methods_on_a_turned_model_are_stopped_and_resumed(method, demo_model, calibration, tmp_path):
    modules = {"model.layers.1.*": 16, "*.2.self_attn.k_proj": 8}
    common = {"rotate": True, "samples": 2, "modules": modules, "connector_bits": 8}
    settings = Settings(bits=4, group_size=64, method=method, **common)
    quantize(str(demo_model), tmp_path / "whole", calibration, settings)
    stop = functools.partial(next, iter([False, False, True]))
    with pytest.raises(StoppedError):
        quantize(str(demo_model), tmp_path / "out", calibration, settings, stop=stop)
    quantize(str(demo_model), tmp_path / "out", calibration, settings, resume=True)
    assert (tmp_path / "out/SHA256SUMS").read_text() == (tmp_path / "whole/SHA256SUMS").read_text()
    found = {name: module.format.bits for name, module in verify(tmp_path / "out").modules.items()}
    assert found["model.layers.2.self_attn.k_proj"] == 8 and not any("layers.1." in name for name in found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2_vl", {}),  # whose head is tied
        ("qwen3_vl_moe", {"vision_bits": 8, "connector_bits": 8}),
        ("qwen3_vl_moe", {"modules": {"*.experts.*": 16}}),
    ],
)
def test_a_turned_checkpoint_is_the_model_but_for_rounding(name, options, tmp_path):
    """At 8 bits; any part that were turned alone would give other logits. Its size is the one that was foretold."""
    samples, folder = widened(name, tmp_path)
    settings = Settings(bits=8, group_size=32, method="rtn", rotate=True, **options)
    quantize(str(folder), tmp_path / "out", None, settings)
    dequantize(tmp_path / "out", tmp_path / "twin")
    expected, found = (logits(path, samples[0].inputs) for path in (folder, tmp_path / "twin"))
    assert float((found - expected).norm() / expected.norm()) < 0.05
    plan, headers = make_plan(str(folder), settings), read_headers(tmp_path / "out")
    assert plan.checkpoint_bytes == pytest.approx(sum(info.nbytes for info in headers.values()), rel=0.01)
    assert plan.source_bytes == sum(info.nbytes for info in read_headers(folder).values())
