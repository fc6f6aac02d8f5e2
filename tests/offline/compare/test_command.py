"""`vlmq compare` as a command on the trained demo model: what it prints and writes, its warnings and mistakes."""

import functools
import json
import shutil

import pytest

from vlmq_vllm.offline.compare.engine import reason
from vlmq_vllm.offline.compare.run import compare
from vlmq_vllm.offline.settings.compare import CompareSettings

TEXT = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}]})


@pytest.fixture
def vlmq(vlmq):
    """`vlmq compare ARGS`."""
    return functools.partial(vlmq, "compare")


def test_calibration_chats_among_the_evaluation_are_counted(demo_model, quantized, calibration, evaluation, tmp_path):
    settings = CompareSettings(device="cpu", max_new_tokens=0)
    both = calibration.parent / "both.jsonl"
    both.write_text("\n".join(calibration.read_text().splitlines()[:3]) + "\n" + TEXT)
    said = []
    report = compare(str(demo_model), quantized, both, settings, say=said.append)
    assert report["calibration_overlap"] == 3
    assert said == [line for line in said if line.startswith("warning: 3 of 4 evaluation chats are calibration chats")]
    assert len(said) == 1
    assert compare(str(demo_model), quantized, evaluation, settings)["calibration_overlap"] == 0
    assert compare(str(demo_model), demo_model, evaluation, settings)["calibration_overlap"] is None


def test_table_and_json(vlmq, demo_model, rounded, evaluation, tmp_path):
    data = ("--data", evaluation, "--device", "cpu", "--max-new-tokens", 4, "--cache", tmp_path / "cache")
    code, table, _ = vlmq(demo_model, rounded[4], *data, "-o", tmp_path / "report.json")
    assert code == 0 and "a lower bound" in table and max(map(len, table.splitlines())) <= 240
    report = json.loads((tmp_path / "report.json").read_text())
    code, said, _ = vlmq(demo_model, rounded[4], *data, "--json")
    assert code == 0 and json.loads(said) == report | {"teacher_from_cache": True}
    kl = report["splits"][0]["kl"]
    lines = table.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith(" all"))
    assert f"{kl['mean']:.2g}" in lines[row].split() and f"{kl['low']:.2g} .. {kl['high']:.2g}" in lines[row + 1]
    code, _, errors = vlmq(demo_model, rounded[4], *data, "-o", tmp_path / "report.json")
    assert code == 2 and "exists already" in errors[0]


def change(model, folder, name, change):
    """A copy of the model with one JSON file changed."""
    shutil.copytree(model, folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def write(folder, text):
    (folder / "chats.jsonl").write_text(text)
    return folder / "chats.jsonl"


UNANSWERED = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
MISTAKES = {  # arguments after MODEL from (demo model, its 4-bit version, temporary folder, evaluation data)
    "no answer": (lambda m, q, t, e: [q, "--data", write(t, TEXT + "\n" + UNANSWERED)], 2, "chats.jsonl line 2 has no"),
    "no data": (lambda m, q, t, e: [q, "--data", t / "none.jsonl"], 2, "none.jsonl"),
    "empty data": (lambda m, q, t, e: [q, "--data", write(t, "\n")], 2, "chats.jsonl holds no chat"),
    "too long": (lambda m, q, t, e: [q, "--data", e, "--max-tokens", 3], 2, "no chat in"),
    "tokenizer": (
        lambda m, q, t, e: [
            change(q, t / "o", "tokenizer.json", lambda c: c["added_tokens"][-3].update(content="<|other|>")),
            *("--data", e),
        ],
        2,
        "different tokenizers",
    ),
    "vocabulary": (
        lambda m, q, t, e: [
            change(q, t / "o", "config.json", lambda c: c["text_config"].update(vocab_size=256)),
            *("--data", e),
        ],
        2,
        "has a vocabulary of 512",
    ),
    "not a folder": (lambda m, q, t, e: [t / "none", "--data", e], 4, "is not a folder"),
    "backend": (lambda m, q, t, e: [q, "--data", e, "--backend", "onnx"], 2, "choose one of hf, vllm"),
    "dtype": (lambda m, q, t, e: [q, "--data", e, "--dtype", "int8"], 2, "choose one of bfloat16, float16, float32"),
    "top": (lambda m, q, t, e: [q, "--data", e, "--top", 0], 2, "top is 0; it must be at least 1"),
    "top of vllm": (lambda m, q, t, e: [q, "--data", e, "--top", 500, "--backend", "vllm"], 2, "names at most 127"),
    "device": (lambda m, q, t, e: [q, "--data", e, "--device", "cuda:77"], 2, "device 'cuda:77' cannot be used"),
    "report": (lambda m, q, t, e: [q, "--data", e, "-o", t / "a/b.json"], 2, "lies in no folder"),
    "cache": (lambda m, q, t, e: [q, "--data", e, "--cache", e], 2, "give --cache a folder"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, code, message, vlmq, demo_model, rounded, evaluation, tmp_path):
    found, said, errors = vlmq(demo_model, *arguments(demo_model, rounded[4], tmp_path, evaluation))
    assert found == code and said == ""
    assert len(errors) == 1 and errors[0].startswith("vlmq: error: ") and message in errors[0]


def test_arguments_the_wrong_way_round(vlmq, demo_model, rounded, evaluation):
    code, _, errors = vlmq(rounded[4], demo_model, "--data", evaluation)
    assert code == 2 and len(errors) == 1 and "is itself quantised by vlmq; give the 16-bit original first" in errors[0]


def test_missing_weights_are_not_made_up(vlmq, demo_model, evaluation, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(demo_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, _, errors = vlmq(demo_model, folder, "--data", evaluation, "--device", "cpu", "--samples", 1)
    assert code == 4 and "has no tensor that fits model.language_model.norm.weight" in errors[-1]


LOG = """(EngineCore pid=7) ERROR 01-01 core.py:1] vlmq_vllm.errors.CheckpointError: model.norm.weight is missing
(EngineCore pid=7) Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
(Worker pid=8) INFO 01-01 multiproc.py:2] Parent process exited
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [(LOG, "CheckpointError: model.norm.weight is missing"), ("Killed\n", "Killed"), ("", "it said nothing")],
)
def test_reason_of_an_engine_that_failed(log, expected):
    assert reason(log) == expected
