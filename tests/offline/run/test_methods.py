"""Every method from chats to a checkpoint: sound files, what the report says, and runs that are stopped and resumed."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.headers import read_headers
from vlmq_vllm.offline.checkpoint.verify import verify
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings

GROUP = {"bits": 4, "group_size": 64, "samples": 3}
METHODS = {
    "awq": {"method": "awq"},
    "awq-mse": {"method": "awq", "scale_loss": "mse"},
    "mbq": {"method": "awq", "saliency": "modality"},
    "qig": {"method": "awq", "saliency": "qig"},
    "qig-in-gptq": {"method": "gptq", "saliency": "qig"},
    "mbq-in-qep": {"method": "gptq", "base": "qep", "saliency": "modality"},
    "vlmq-by-its-parts": {"method": "gptq", "base": "qep", "saliency": "vlmq", "damp": 0.1},
    "q-vlm": {"method": "qvlm"},
    "q-vlm-tower": {"method": "qvlm", "vision_bits": 4, "connector_bits": 8},
    "awq-rounded": {"method": "awq", "activation_bits": 8},
    "qig-rounded": {"method": "awq", "saliency": "qig", "activation_bits": 8},
    "vlmq-rounded": {"method": "vlmq", "saliency_scope": "all", "activation_bits": 8, "vision_bits": 8},
}
# Tested in make test by another method that takes the same way.
SLOW = ("awq-mse", "mbq", "qig", "q-vlm-tower", "qig-rounded", "awq-rounded")
SCALED = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
SCALED += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def tensors(folder) -> dict[str, torch.Tensor]:
    files = {info.file for info in read_headers(folder).values()}
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


@pytest.fixture(scope="module")
def runs(demo_model, calibration, tmp_path_factory):
    """A method's checkpoint, made once."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "out"
            quantize(str(demo_model), made[name], calibration, Settings(**GROUP | METHODS[name]))
        return made[name]

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in METHODS]
)
def test_stopped_and_resumed(name, runs, demo_model, calibration, tmp_path):
    """Sound, and the same bytes when the run was stopped before its third unit."""
    whole, settings = runs(name), Settings(**GROUP | METHODS[name])
    assert {module.format.bits for module in verify(whole).modules.values()} >= {4}
    stop = functools.partial(next, iter([False, False, True]))
    with pytest.raises(StoppedError):
        quantize(str(demo_model), tmp_path / "out", calibration, settings, stop=stop)
    quantize(str(demo_model), tmp_path / "out", calibration, settings, resume=True)
    assert (tmp_path / "out/SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()


def test_vlmq_is_gptq_with_its_weights(runs, demo_model, calibration, tmp_path):
    """And not without them, but for the first layer, where there is no signal."""
    for name, method in (("vlmq", {"method": "vlmq"}), ("unweighted", {"method": "gptq", "base": "qep", "damp": 0.1})):
        quantize(str(demo_model), tmp_path / name, calibration, Settings(**GROUP | method))
    folders = tmp_path / "vlmq", runs("vlmq-by-its-parts"), tmp_path / "unweighted"
    one, other, unweighted = map(tensors, folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj.weight_packed"
        assert torch.equal(one[name], unweighted[name]) == (layer == 0)


def test_scaled_channels(runs, demo_model):
    """Norms take the scales, in their own dtype; the report gives every linear's exponent."""
    before, after = tensors(demo_model), tensors(runs("awq"))
    rows = json.loads((runs("awq") / "vlmq_report.json").read_text())["modules"]
    assert [row["module"].partition("layers.0.")[2] for row in rows[:7]] == SCALED
    assert all(row["scaling"] in [i / 20 for i in range(20)] and row["base"] is None for row in rows)
    for layer in range(4):
        ratios = {
            row["module"].rpartition(".")[2]: row["scaling"] for row in rows if f"layers.{layer}." in row["module"]
        }
        for norm, linear in (("input_layernorm", "q_proj"), ("post_attention_layernorm", "up_proj")):
            name = f"model.layers.{layer}.{norm}.weight"
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name]) == (ratios[linear] == 0)
    assert any(row["scaling"] > 0 for row in rows)


def test_scaled_norms_of_a_wider_dtype(demo_model, calibration, tmp_path):
    """They are written as they were stored, with the values that they get where all is in 16 bits."""
    wide = shutil.copytree(demo_model, tmp_path / "wide")
    before = tensors(demo_model)
    for file in wide.glob("*.safetensors"):
        kept = load_file(file)
        save_file({n: t.float() if "layernorm" in n else t for n, t in kept.items()}, file, {"format": "pt"})
    options = Settings(**GROUP | METHODS["awq"] | {"samples": 2})
    for model, name in ((demo_model, "one"), (wide, "other")):
        quantize(str(model), tmp_path / name, calibration, options)
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    norms = [name for name in before if "layernorm" in name]
    assert norms and any(not torch.equal(before[name], one[name]) for name in norms)
    for name in norms:
        assert other[name].dtype == torch.float32 and torch.equal(other[name], one[name].float())


def test_report_of_token_weights(runs):
    found = {}
    for name in ("mbq", "qig", "qig-rounded", "q-vlm", "mbq-in-qep"):
        rows = json.loads((runs(name) / "vlmq_report.json").read_text())["modules"]
        found[name] = {row["tokens"] for row in rows}, {row["base"] for row in rows}
    assert found["mbq"] == ({"modality"}, {None})
    assert found["qig"] == ({"saliency"}, {None})
    # at the first layer full-precision and rounded path have one input: nothing to integrate along
    assert found["qig-rounded"] == ({"saliency", "no signal"}, {None})
    assert found["q-vlm"] == ({"equal"}, {None})
    assert found["mbq-in-qep"] == ({"modality"}, {"qep"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "awq", "saliency": "vlmq"}, "method awq takes none or modality or qig"),
        ({"method": "rtn", "saliency": "qig"}, "method rtn takes none"),
        ({"method": "vlmq", "saliency": "none"}, "--method gptq takes all"),
        ({"method": "sparse"}, "choose one of rtn, awq, gptq, vlmq, qvlm"),
        ({"bits": 3, "activation_bits": 8}, "weights of 3 bits"),
        ({"bits": 4, "activation_bits": 8, "modules": {"a": 2}}, "weights of 2 bits"),
        ({"bits": 4, "activation_bits": 4}, "choose one of 8, 16"),
        ({"bits": 4, "activation_bits": 8, "method": "qvlm"}, "weights alone"),
        ({"method": "awq", "scale_loss": "max"}, "choose one of mae, mse"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(QuantizeError, match=message):
        Settings(**settings)
