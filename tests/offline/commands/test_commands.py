"""The `vlmq` command as a user meets it: every mistake is one line, an exit code, and nothing half-written.

Exit codes: 2 usage, 3 refused before work, 4 files that are not sound, 75 stopped and to be resumed.
"""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from vlmq_vllm.offline.settings.methods import unread
from vlmq_vllm.offline.settings.quantize import Settings


def test_quantize_verify_dequantize(vlmq, demo_model, tmp_path):
    out = tmp_path / "w4"
    code, said, _ = vlmq("quantize", demo_model, "-o", out, "--method", "rtn", "--bits", 4, "--group_size", 64)
    assert code == 0 and f"vllm serve {out} --quantization vlmq" in said
    code, said, _ = vlmq("verify", out)
    assert code == 0 and "is sound" in said and "28 at 4 bits" in said
    assert vlmq("dequantize", out, "-o", tmp_path / "w16")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"w4", "w16"}


def chat_file(folder, content):
    path = folder / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    return path


def fake_model(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_config(model, folder, config):
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


RTN = ("--method", "rtn")
MISTAKES = {
    "missing folder": (lambda m, t: [t / "none", *RTN], "is not a folder"),
    "empty folder": (lambda m, t: [t, *RTN], "has no config.json"),
    "text-only": (lambda m, t: [fake_model(t / "m", {"model_type": "llama"}), *RTN], "'llama' is a text-only model"),
    "unknown family": (
        lambda m, t: [fake_model(t / "m", {"model_type": "new_vl", "vision_config": {}}), *RTN],
        "'new_vl' is not supported yet; supported: ",
    ),
    "already quantised": (
        lambda m, t: [
            fake_model(t / "m", {"quantization_config": {"quant_method": "awq"}}),
            *RTN,
        ],
        "already quantised (quant_method 'awq')",
    ),
    "language model already quantised": (
        lambda m, t: [fake_model(t / "m", {"text_config": {"quantization_config": "gptq"}}), *RTN],
        "already quantised (quant_method 'gptq')",
    ),
    "config that describes no model": (
        lambda m, t: [with_config(m, t / "m", {"model_type": "qwen2_vl", "text_config": 3}), *RTN],
        "transformers cannot build the model that",
    ),
    "device that is not there": (lambda m, t: [m, *RTN, "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    "bits 5": (lambda m, t: [m, "--bits", 5], "bits is 5; choose one of 2, 3, 4"),
    "unaligned groups": (lambda m, t: [m, "--group-size", 48], "group_size is 48; with 3 bits groups begin on"),
    "unknown method": (lambda m, t: [m, "--method", "magic"], "method is magic; choose one of rtn, awq, gptq"),
    "no data": (lambda m, t: [m], "method 'vlmq' needs calibration data; give --data FILE.jsonl"),
    "data that is not there": (
        lambda m, t: [m, "--data", t / "none.jsonl"],
        "none.jsonl: it does not exist; give a JSONL",
    ),
    "cap below floor": (lambda m, t: [m, "--saliency-floor", 2, "--saliency-cap", 1], "saliency_cap is 1.0, below"),
    "recipe with an unknown key": (
        lambda m, t: [m, "--recipe", recipe(t, "bit: 3")],
        "the recipe has the key 'bit'; there are bits, group_size",
    ),
    "recipe with a word for a number": (
        lambda m, t: [m, "--recipe", recipe(t, "bits: three")],
        "the recipe's bits is 'three'; it must be of type",
    ),
    "recipe with nothing for a number": (lambda m, t: [m, "--recipe", recipe(t, "seed:")], "the recipe's seed is None"),
    "recipe that is a list": (lambda m, t: [m, "--recipe", recipe(t, "- 3")], "holds no settings"),
    "recipe that is not there": (lambda m, t: [m, "--recipe", t / "r.yaml"], "cannot read the recipe"),
    "data without images": (lambda m, t: [m, "--data", chat_file(t, "hi")], "none of the 1 samples in"),
    "output exists": (lambda m, t: [m, "-o", t], "exists already; remove it or choose another folder"),
    "no place for output": (lambda m, t: [m, "-o", t / "a/b"], "is not a folder; create it"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, message, vlmq, demo_model, tmp_path):
    arguments = arguments(demo_model, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = [] if "-o" in arguments else ["-o", tmp_path / "out"]
    code, said, errors = vlmq("quantize", *arguments, *out)
    refused = any(words in message for words in ("text-only", "not supported", "already quantised"))
    assert code == (3 if refused else 4 if "config.json" in message else 2) and said == ""
    assert len(errors) == 1 and errors[0].startswith("vlmq: error: ") and message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_gives_the_same_checkpoint_and_options_win(vlmq, demo_model, tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    assert vlmq("quantize", demo_model, "-o", first, *RTN, "--bits", 4, "--group-size", 32, "--symmetric")[0] == 0
    assert vlmq("quantize", demo_model, "-o", again, "--recipe", first / "vlmq_recipe.yaml")[0] == 0
    assert (again / "SHA256SUMS").read_text() == (first / "SHA256SUMS").read_text()
    short = recipe(tmp_path, "method: rtn\ngroup-size: 32\nbits: 4\n")
    code, said, _ = vlmq("quantize", demo_model, "-o", other, "--recipe", short, "--bits", 2, "--json")
    assert code == 0
    settings = json.loads(said)["settings"]
    assert (settings["bits"], settings["group_size"], settings["method"]) == (2, 32, "rtn")


@pytest.mark.parametrize(
    ("method", "saliency", "idle"),
    [
        ("rtn", "none", ["scale_loss", "damp", "act_order", "saliency_power"]),
        ("awq", "qig", ["damp", "act_order", "saliency_power"]),
        ("gptq", "modality", ["scale_loss", "saliency_power"]),
        ("gptq", "vlmq", ["scale_loss"]),
        ("vlmq", "vlmq", ["scale_loss"]),
    ],
)
def test_options_that_a_method_makes_no_use_of(method, saliency, idle):
    options = {"scale_loss": "mse", "damp": 0.02, "act_order": "none", "saliency_power": 1, "grid": "minmax"}
    chosen = Settings(method=method, saliency=saliency)
    assert unread(chosen.method, chosen.saliency, list(options)) == idle


def test_an_option_without_use_is_named(vlmq, demo_model, tmp_path):
    code, _, said = vlmq("quantize", demo_model, "-o", tmp_path / "out", *RTN, "--damp", "0.02", "--act-order", "none")
    assert code == 0 and "vlmq: method rtn makes no use of --damp, --act-order" in said


def test_hub_names(vlmq, demo_model, tmp_path, monkeypatch):
    """Without a network: a name that is in the hub's local cache works, another ends in one line."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    (tmp_path / "models--vlmq--demo/refs").mkdir(parents=True)
    (tmp_path / "models--vlmq--demo/refs/main").write_text(commit)
    snapshot = tmp_path / "models--vlmq--demo/snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in demo_model.iterdir():  # the hub's snapshots are links to blobs
        (snapshot / path.name).symlink_to(path)
    options = ("--method", "rtn", "--group-size", 64)
    assert vlmq("quantize", "vlmq/demo", "-o", tmp_path / "out", *options)[0] == 0
    code, _, errors = vlmq("quantize", "vlmq/other", "-o", tmp_path / "other", *options)
    assert code == 2 and len(errors) == 1
    assert "vlmq/other is neither a folder here nor to be had from the hub" in errors[0]


def test_too_little_disk_is_noticed_before_work(vlmq, demo_model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, errors = vlmq("quantize", demo_model, "-o", tmp_path / "out", "--method", "rtn")
    assert code == 3 and "has 1.0 MB free, the checkpoint needs" in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["verify", "dequantize"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not valid JSON"),
        (lambda folder: (folder / "model-00001-of-00005.safetensors").write_bytes(b"junk"), "is damaged"),
        (lambda folder: (folder / "model-00001-of-00005.safetensors").unlink(), "lacks model-00001"),
    ],
    ids=["no config", "broken config", "broken weights", "missing weights"],
)
def test_damaged_checkpoints_end_in_one_line(command, damage, message, vlmq, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "model")
    damage(folder)
    code, said, errors = vlmq(command, folder, *(["-o", tmp_path / "out"] if command == "dequantize" else []))
    assert code == 4 and said == "" and len(errors) == 1 and message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_help_is_quick():
    """`vlmq --help` must not wait for torch."""
    code = "import sys; sys.argv = ['vlmq', '--help']\nfrom vlmq_vllm.offline.commands import app\ntry:\n app.main()\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
