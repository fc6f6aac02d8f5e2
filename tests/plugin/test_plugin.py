"""The plugin's configuration: what it reads, what it claims, what it refuses, and what registering it costs."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_layers import W4, config_of, random_weight
from vlmq_vllm import register
from vlmq_vllm.checkpoint import ModuleInfo, QuantizationSpec
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.serving.config import VLMQConfig


def write_model(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with one quantised module, and its tensors to damage."""
    tensors = {f"fc.{part}": tensor for part, tensor in random_weight(W4, 64, 128).tensors().items()}
    config = {"quantization_config": QuantizationSpec(W4, {}).to_dict({})}
    return write_model(tmp_path / "model", config, tensors), config, tensors


def test_config_reads_the_headers_and_can_be_pickled(checkpoint):
    folder, config, _ = checkpoint
    quantisation = VLMQConfig.from_config(config["quantization_config"])
    quantisation.maybe_update_config(str(folder), hf_config=None, revision=None)
    assert quantisation.modules == {"fc": ModuleInfo(W4, 64, 128)}
    assert pickle.loads(pickle.dumps(quantisation)).modules == quantisation.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version is 3.*reads 1 and 2"),
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 20}, "group_size is 20"),
        ({"group_size": 1 << 40}, "group_size is 1099511627776"),
        ({"overrides": {"fc": {"bits": 4}}}, "fc.* lacks 'group_size'"),
    ],
)
def test_config_that_cannot_be_served_is_refused(checkpoint, change, message):
    _, config, _ = checkpoint
    with pytest.raises(RuntimeError, match=message):
        VLMQConfig.from_config(config["quantization_config"] | change)


def test_damaged_checkpoint_is_refused_before_anything_is_built(checkpoint):
    folder, config, tensors = checkpoint
    quantisation = VLMQConfig.from_config(config["quantization_config"])
    without = {name: tensor for name, tensor in tensors.items() if name != "fc.weight_scale"}
    wrong = tensors | {"fc.weight_packed": tensors["fc.weight_packed"][:, :-1].contiguous()}
    for damaged, message in ((without, "fc.weight_scale is missing"), (wrong, "fc.weight_packed has shape")):
        write_model(folder, config, damaged)
        with pytest.raises(RuntimeError, match=message):
            quantisation.maybe_update_config(str(folder))
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(RuntimeError, match="model.safetensors is damaged"):
        quantisation.maybe_update_config(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="lacks"):
        quantisation.maybe_update_config(str(folder))


def test_model_without_quantised_tensors_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="MODEL is not quantised .*vlmq quantize"):
        VLMQConfig().maybe_update_config("MODEL")
    folder = write_model(tmp_path / "plain", {"quantization_config": QuantizationSpec(W4, {}).to_dict({})}, {})
    quantisation = VLMQConfig(QuantizationSpec(W4, {}))
    with pytest.raises(RuntimeError, match="calls itself quantised, but no tensor is"):
        quantisation.maybe_update_config(str(folder))


def test_hub_model_whose_headers_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="headers of nobody/nothing cannot be read"):
        VLMQConfig(QuantizationSpec(W4, {})).maybe_update_config("nobody/nothing")


def test_hub_model_is_read_where_it_was_downloaded(checkpoint, monkeypatch):
    folder, config, _ = checkpoint
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options) or folder)
    quantisation = VLMQConfig.from_config(config["quantization_config"])
    quantisation.maybe_update_config("somebody/model", revision="main")
    assert quantisation.modules == {"fc": ModuleInfo(W4, 64, 128)}
    assert asked["revision"] == "main" and "*.safetensors" in asked["allow_patterns"]


def test_override_claims_what_is_vlmq_or_asked_for_and_never_raises():
    ask = VLMQConfig.override_quantization_method
    assert ask({"quant_method": "vlmq"}, None) == "vlmq"
    for foreign in ({"quant_method": "gptq"}, {}, None, [], {"quant_method": None}):
        assert ask(foreign, None) is None
        assert ask(foreign, "awq", hf_config=object()) is None
        assert ask(foreign, "vlmq", hf_config=object()) == "vlmq"


@pytest.mark.parametrize("method", ["awq", "fp8", None])
def test_model_of_another_method_is_refused_when_asked_for(method):
    message = (
        f"the model is quantised with '{str(method).lower()}'; vlmq reads vlmq, gptq, .*; leave out --quantization"
    )
    with pytest.raises(RuntimeError, match=message):
        VLMQConfig.from_config({"quant_method": method, "bits": 4})


def test_registering_twice_is_harmless():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    register()
    assert QUANTIZATION_METHODS.count("vlmq") == 1
    assert get_quantization_config("vlmq") is VLMQConfig


def test_register_costs_little_and_initialises_nothing():
    program = (
        "import sys, time\n"
        "import vlmq_vllm\n"
        "assert not {'torch', 'vllm', 'triton'} & set(sys.modules), 'importing the package loads too much'\n"
        "import vllm.model_executor.layers.quantization\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "vlmq_vllm.register()\n"
        "took, new = time.process_time() - start, set(sys.modules) - before\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [name for name in new if name.startswith(('triton', 'vlmq_vllm.kernels', 'vllm.model'))], new\n"
        "assert took < 0.05, took\n"  # seconds of processor time; seen: 0.02
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("release", "told"), [((0, 25), True), ((0, 26), False), ((0, 33), False), ((0, 34), True), ((0, 0), False)]
)
def test_other_releases_of_vllm_are_told(monkeypatch, caplog, release, told):
    monkeypatch.setattr("vllm.version.__version_tuple__", (*release, 1))
    register()
    message = f"this is vLLM {release[0]}.{release[1]}; vlmq-vllm 0.1.0 is tested with 0.26 to 0.33"
    assert (message in caplog.text) is told


def test_failing_registration_is_logged_and_stops_nothing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    register()
    assert "vlmq could not register" in caplog.text


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        (None, "--quantization vlmq was given, but .* is not quantised"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "the model is quantised with .awq.; vlmq reads"),
        (QuantizationSpec(W4, {}).to_dict({}), "cannot be served: .* lacks"),
    ],
    ids=["not quantised", "awq", "no weights"],
)
def test_vllm_ends_with_the_message(tmp_path, quantisation, message):
    with pytest.raises(RuntimeError, match=message):
        configure(tmp_path, quantisation, "bfloat16")


def test_vllm_ends_float32_with_what_is_supported(tmp_path):
    message = r"torch.float32 is not supported .* vlmq. Supported dtypes: \[torch.float16, torch.bfloat16\]"
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, QuantizationSpec(W4, {}).to_dict({}), "float32")


def configure(folder: Path, quantisation: dict | None, dtype: str) -> None:
    """vLLM's own configuration of a model without weights, as a server makes it before anything is built."""
    from vllm.config import ModelConfig, VllmConfig

    register()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 64}
    config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"quantization_config": quantisation} if quantisation else {}
    (folder / "config.json").write_text(json.dumps(config))
    VllmConfig(model_config=ModelConfig(str(folder), dtype=dtype, quantization="vlmq", skip_tokenizer_init=True))


def test_module_without_a_layer_is_named_with_the_reason():
    names = ["fc", "projector.0", "vision_tower.encoder.layers.0.mlp.fc1"]
    config = config_of({name: random_weight(W4, 64, 128) for name in names})
    config.claims.add("fc", [("fc", config.modules["fc"])])
    config.claims.reasons = {names[2]: "vLLM builds SigLIP's MLP unquantised"}
    message = (
        r"2 of 3 quantised modules find no place in vLLM: projector.0 \(vLLM builds no quantisable layer for it\), "
        rf"{names[2]} \(vLLM builds SigLIP's MLP unquantised\); quantise again"
    )
    with pytest.raises(ValueError, match=message):
        config.get_cache_scale_mapper()


def test_modules_of_other_pipeline_stages_are_no_error():
    config = config_of({"fc": random_weight(W4, 64, 128)})
    config.claims.partial = True
    assert config.get_cache_scale_mapper() is not None


def test_table_at_start_says_what_is_quantised_and_what_is_not():
    config = config_of({"fc": random_weight(W4, 64, 128), "k_proj": random_weight(WeightFormat(3, -1, False), 64, 128)})
    for i in range(12):
        config.claims.add(f"layers.{i}.qkv_proj", [("fc", config.modules["fc"]), ("k_proj", config.modules["k_proj"])])
    config.claims.add("layers.0.fc", [("fc", config.modules["fc"]), ("x", None)])
    config.claims.add("visual.proj")
    assert str(config.claims).splitlines() == [
        "  W4 g64 | W3 row asym   12 x layers.*.qkv_proj",
        "  W4 g64 | 16             1 x layers.*.fc",
        "  16                      1 x visual.proj",
    ]
