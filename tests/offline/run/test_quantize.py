"""The whole offline pipeline on the trained demo model: what is written, how good it is, that it is repeatable."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmq_vllm.checkpoint import read_modules
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import unpack
from vlmq_vllm.headers import read_headers
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.checkpoint.verify import verify
from vlmq_vllm.offline.data.inputs import model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.methods.gptq.moments import Moments
from vlmq_vllm.offline.methods.gptq.solve import Solver, solve
from vlmq_vllm.offline.methods.saliency.vlmq import gradient_norms, token_weights
from vlmq_vllm.offline.model import capture
from vlmq_vllm.offline.model.families import FAMILIES
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings


def tensors(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_decoder_linears_are_packed_and_everything_else_is_untouched(quantized, demo_model):
    modules = read_modules(quantized)
    assert len(modules) == 4 * 7
    assert all(name.startswith("model.layers.") for name in modules)
    before, after = tensors(demo_model), tensors(quantized)
    kept = {name for name in before if name.removesuffix(".weight") not in modules}
    assert kept == {n for n in after if n.rpartition(".")[0] not in modules or n.endswith(".bias")}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_files_that_a_server_needs_are_there(quantized, demo_model):
    names = {path.name for path in quantized.iterdir()}
    assert {path.name for path in demo_model.iterdir() if path.suffix != ".safetensors"} <= names
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"].items() >= {"quant_method": "vlmq", "bits": 3, "group_size": 64}.items()
    assert config["quantization_config"]["tool"]["settings"]["method"] == "vlmq"
    index = json.loads((quantized / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == read_headers(quantized).keys()


def test_report_tells_which_tokens_were_weighted(quantized):
    """Layer 0 has no error to learn from; after it the attention's four are weighted, the MLP's only where asked."""
    rows = json.loads((quantized / "vlmq_report.json").read_text())["modules"]
    attention = {f"self_attn.{part}_proj": "saliency" for part in "qkvo"}
    parts = attention | {f"mlp.{part}_proj": "equal" for part in ("gate", "up", "down")}
    expected = {f"model.layers.{i}.{part}": tokens for i in range(4) for part, tokens in parts.items()}
    expected |= {f"model.layers.0.{part}": "no signal" for part in attention}
    assert {row["module"]: row["tokens"] for row in rows} == expected
    assert all(row["damp"] == 0.1 and row["loss"] > 0 for row in rows)
    effective = {row["module"]: row["effective_tokens"] for row in rows if row["tokens"] == "saliency"}
    assert all((row["effective_tokens"] is None) == (row["module"] not in effective) for row in rows)
    assert all(1 < count < 8 * 64 for count in effective.values())  # of eight chats of less than 64 tokens


def test_a_layer_with_few_effective_tokens_is_told_once(demo_model, calibration, tmp_path, caplog):
    quantize(str(demo_model), tmp_path / "out", calibration, Settings(bits=3, group_size=64, samples=1))
    told = [record.getMessage() for record in caplog.records if "effective tokens" in record.getMessage()]
    assert len(told) == 3 and all("for 256 columns; lower --saliency-cap or raise --samples" in line for line in told)


def test_same_settings_give_the_same_bytes(quantized, demo_model, calibration, tmp_path):
    quantize(str(demo_model), tmp_path / "again", calibration, Settings(bits=3, group_size=64))
    assert (tmp_path / "again/SHA256SUMS").read_text() == (quantized / "SHA256SUMS").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(bits=2, group_size=32, method="gptq", symmetric=True),
        Settings(bits=4, group_size=-1, method="vlmq", saliency_power=1, act_order="none"),
        Settings(bits=3, group_size=96, method="rtn", grid="minmax"),  # 256 = 2 * 96 + 64: a partial last group
    ],
    ids=lambda s: f"{s.method}-w{s.bits}-g{s.group_size}",
)
def test_other_settings_give_sound_checkpoints(settings, demo_model, calibration, tmp_path):
    data = None if settings.method == "rtn" else calibration
    quantize(str(demo_model), tmp_path / "out", data, settings)
    assert all(module.format == settings.format for module in verify(tmp_path / "out").modules.values())


def test_calibration_beats_rounding_on_held_out_questions(demo_model, tmp_path):
    """At 2 bits, where damage is plain: likelihood of right answers, not the loss that the solver minimised."""
    from data import write
    from evaluate import judge, load

    calibration = write(tmp_path / "calibration", "calibration", 64)
    losses = {}
    for method in ("rtn", "gptq", "vlmq"):
        quantize(str(demo_model), tmp_path / method, calibration, Settings(bits=2, group_size=32, method=method))
        dequantize(tmp_path / method, tmp_path / f"{method}-16")
        scores = judge(*load(str(tmp_path / f"{method}-16")), "evaluation", 70)
        losses[method] = sum(loss for _, loss in scores.values())
    assert losses["gptq"] < losses["rtn"]
    assert losses["vlmq"] < losses["rtn"]


def test_dequantized_twin_has_the_sources_names_and_nearby_weights(quantized, demo_model, tmp_path):
    dequantize(quantized, tmp_path / "twin")
    before, after = tensors(demo_model), tensors(tmp_path / "twin")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    name = "model.layers.2.mlp.down_proj.weight"
    relative = (after[name] - before[name]).float().norm() / before[name].float().norm()
    assert 0.02 < relative < 0.4  # 3 bits: a step of about a third of a deviation
    assert "quantization_config" not in json.loads((tmp_path / "twin/config.json").read_text())


def test_replay_that_differs_from_the_models_forward_stops_before_work(demo_model, calibration, tmp_path, monkeypatch):
    """Positions shifted by one for the replay alone, as a quantiser that rebuilds them by hand might have them."""
    catch = capture.catch

    def shifted(*args):
        caught = catch(*args)
        for _, kwargs in caught.calls:
            kwargs["position_embeddings"] = tuple(t.roll(1, dims=1) for t in kwargs["position_embeddings"])
        return caught

    monkeypatch.setattr(capture, "catch", shifted)
    with pytest.raises(QuantizeError, match=r"replaying model.language_model.layers.0 differs"):
        quantize(str(demo_model), tmp_path / "out", calibration, Settings())
    assert not list(tmp_path.iterdir())


def test_weights_are_in_memory_only_while_they_are_needed(demo_model):
    source = Source(demo_model)
    name = "model.language_model.layers.1"
    layer = source.materialise(name, torch.device("cpu"))
    assert not layer.mlp.up_proj.weight.is_meta and not layer.mlp.up_proj.weight.requires_grad
    source.release(name)
    assert all(parameter.is_meta for parameter in source.model.parameters())


def nan(tensor):
    tensor[3, 4] = float("nan")
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "missing linear": (lambda t: t.pop(UP), "has no tensor for model.language_model.layers.1.mlp.up_proj.weight"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "has no tensor for model.language_model.norm.weight"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "has no tensor for lm_head.weight"),
    "other shape": (lambda t: t.update({UP: t[UP][:-1]}), r"has shape \[767, 256\], config.json makes it \[768, 256\]"),
    "8-bit weights": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "is F8_E4M3; start from a model in"),
    "not finite": (lambda t: nan(t[UP]), f"{UP} holds NaN or infinity"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_sources_are_refused(change, message, demo_model, tmp_path):
    shutil.copytree(demo_model, tmp_path / "model")
    weights = load_file(demo_model / "model.safetensors")
    change(weights)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        quantize(str(tmp_path / "model"), tmp_path / "out", None, Settings(method="rtn"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tied_embeddings_need_no_head_in_the_files(demo_model, tmp_path):
    shutil.copytree(demo_model, tmp_path / "model")
    weights = load_file(demo_model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    config = json.loads((demo_model / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    quantize(str(tmp_path / "model"), tmp_path / "out", None, Settings(method="rtn"))
    assert "lm_head.weight" not in tensors(tmp_path / "out")


def test_skeleton_computes_what_the_loaded_model_computes(demo_model):
    """Buffers that are in no file (rotary frequencies) are those that transformers itself fills in."""
    from transformers import AutoModelForImageTextToText

    loaded = dict(AutoModelForImageTextToText.from_pretrained(demo_model).named_buffers())
    skeleton = dict(Source(demo_model).model.named_buffers())
    assert loaded.keys() == skeleton.keys() and loaded
    assert all(torch.equal(loaded[name], skeleton[name]) for name in loaded)


def inputs_of_layer_1(model, sample) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """What a whole model hands to its layer 1: hidden states, arguments, and the inputs of its down_proj."""
    caught = {}
    layer = model.model.language_model.layers[1]
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: caught.update(x=args[0], kw=kwargs), with_kwargs=True),
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: caught.update(down=args[0][0])),
    ]
    model(**sample, use_cache=False)
    for hook in hooks:
        hook.remove()
    kwargs = {name: value for name, value in caught["kw"].items() if name not in capture.CACHE}
    return caught["x"], kwargs, caught["down"]


def test_layer_after_a_quantised_one(quantized, demo_model, calibration, tmp_path):
    """Layer 1 worked out with transformers alone: U through the dequantised layer 0, F through the original."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    dequantize(quantized, tmp_path / "twin")
    processor = AutoProcessor.from_pretrained(demo_model)
    settings = Settings(bits=3, group_size=64)
    samples = [
        inputs for _, inputs in model_inputs(read_chats(calibration, settings.seed), processor, settings.samples, 2048)
    ]
    original, twin = (
        Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        for folder in (demo_model, tmp_path / "twin")
    )
    layer = original.model.language_model.layers[1]
    linears = ("self_attn.q_proj", "mlp.down_proj")  # with token weights, and without
    batches, norms = [], []
    for sample in samples:
        full, kwargs, full_after = inputs_of_layer_1(original, sample)
        found, _, found_after = inputs_of_layer_1(twin, sample)
        streams = [Stream(hidden, [((), kwargs)]) for hidden in (full, found)]
        norms.append(gradient_norms(layer, 0, FAMILIES["qwen2_vl"], *streams, linears))
        attention = [layer.input_layernorm(hidden)[0] for hidden in (found, full)]
        batches.append(dict(zip(linears, (attention, (found_after, full_after)), strict=True)))
    moments = {}
    for linear, columns in zip(linears, (256, 768), strict=True):
        g = [found[linear] for found in norms]
        moments[linear] = Moments(columns, "cpu", residual=True)
        for batch, weight in zip(batches, token_weights(g, 2, float(torch.cat(g).median()), 0.0, 3.0), strict=True):
            weight = weight if linear == "self_attn.q_proj" else None
            moments[linear].add(batch[linear][0], weight, batch[linear][1])
    stored = tensors(quantized)
    solver = Solver(qep=True, alpha=1.0, damp=settings.damp)  # fewer than six tokens for each column: not refined
    for linear in linears:
        weight = original.get_submodule(f"model.language_model.layers.1.{linear}").weight
        h, d = moments[linear].mean()
        given = (
            weight[None],
            h[None],
            settings.format,
            torch.bfloat16,
            solver,
            (weight @ d if linear == "mlp.down_proj" else d)[None],
        )
        expected = solve(*given)[0].weight.codes
        packed = stored[f"model.layers.1.{linear}.weight_packed"]
        # float32 sums in another order; a code may tip over where it lies between two
        assert (unpack(packed, 3, expected.shape[1]) == expected).float().mean() > 0.99
