"""`vlmq compare` on the trained demo model through transformers: figures and cache."""

import shutil

import numpy as np
import pytest
import torch

from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.compare import hf
from vlmq_vllm.offline.compare.run import compare
from vlmq_vllm.offline.compare.weights import load_model
from vlmq_vllm.offline.data.inputs import load_processor, prepare
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.settings.compare import CompareSettings

EXACT = CompareSettings(dtype="float32", device="cpu", top=1 << 20, max_new_tokens=0)
COUNT = 6  # chats of `evaluation`


@pytest.fixture
def loaded(monkeypatch):
    """Names of the folders whose models are loaded."""
    names = []

    def load(folder, *args):
        names.append(folder.name)
        return load_model(folder, *args)

    monkeypatch.setattr(hf, "load_model", load)
    return names


def test_a_model_beside_itself(demo_model, evaluation):
    report = compare(str(demo_model), demo_model, evaluation, CompareSettings(device="cpu", max_new_tokens=8))
    [everything] = [row for row in report["splits"] if row["split"] == "all"]
    assert report["samples"] == everything["n"] == COUNT
    assert everything["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert everything["top1"]["mean"] == everything["greedy_same"]["mean"] == 1.0
    assert everything["nll_difference"]["mean"] == everything["exact_difference"]["mean"] == 0.0
    assert everything["first_difference"] is None and report["kl"] == {"top": 64, "exact": False}
    assert {row["split"] for row in report["splits"]} > {"with picture", "text only", "task attribute"}


@torch.inference_mode()
def test_figures_equal_a_direct_computation(demo_model, rounded, evaluation, tmp_path):
    """Log-probabilities of both models in float64 from transformers' own loading of the model and of its 2-bit twin.

    Bound: log-probabilities of size 10 are kept in float32, to 2^-21.
    """
    from transformers import Qwen2VLForConditionalGeneration

    report = compare(str(demo_model), rounded[2], evaluation, EXACT)
    assert report["kl"] == {"top": 512, "exact": True}
    dequantize(rounded[2], tmp_path / "twin")
    teacher, student = (
        Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        for folder in (demo_model, tmp_path / "twin")
    )
    processor = load_processor(demo_model)
    end = processor.tokenizer.eos_token_id
    for chat, row in zip(read_all(evaluation), report["rows"], strict=True):
        inputs, _ = prepare(chat, processor)
        ids = inputs["input_ids"][0]
        last = int((ids == end).nonzero()[-1])
        places = torch.arange(last + 1 - row["tokens"], last + 1)
        p, q = (model(**inputs).logits[0, places - 1].double().log_softmax(-1) for model in (teacher, student))
        right = ids[places]
        expected = {
            "kl": (p.exp() * (p - q)).sum(-1).mean(),
            "top1": (p.argmax(-1) == q.argmax(-1)).double().mean(),
            "nll_teacher": -p.gather(1, right[:, None]).mean(),
            "nll_student": -q.gather(1, right[:, None]).mean(),
            "exact_teacher": (p.argmax(-1) == right).all(),
            "exact_student": (q.argmax(-1) == right).all(),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), abs=2e-6), name
    assert max(row["kl"] for row in report["rows"]) > 0.01


def test_exact_match_is_that_of_the_greedy_answer(demo_model, rounded, evaluation):
    """Greedy answers of the 2-bit model, generated with a cache, against the likeliest tokens after the answer's."""
    settings = CompareSettings(dtype="float32", device="cpu", max_new_tokens=16)
    processor = load_processor(demo_model)
    from vlmq_vllm.offline.compare.questions import Exam, end_ids, read_question

    ends = end_ids(demo_model, processor)
    questions = [read_question(chat, processor, ends) for chat in read_all(evaluation)]
    scores = hf.score(rounded[2], Exam(questions, processor, ends, settings), None, lambda items, what: items)
    same = [np.array_equal(score.greedy, score.answer) for score in scores]
    assert same == [bool((score.best == score.answer).all()) for score in scores]
    assert 0 < sum(same) < COUNT


def test_fewer_bits_are_further_away_and_fewer_outcomes_are_a_lower_bound(demo_model, rounded, evaluation):
    far, near = (compare(str(demo_model), rounded[bits], evaluation, EXACT) for bits in (2, 4))
    few = compare(
        str(demo_model), rounded[2], evaluation, CompareSettings(dtype="float32", device="cpu", top=2, max_new_tokens=0)
    )
    kl = {name: _pictured(report) for name, report in (("2", far), ("4", near), ("few", few))}
    assert kl["2"] > 3 * kl["4"] > 0
    assert 0 < kl["few"] < kl["2"]
    for less, more in zip(few["rows"], far["rows"], strict=True):
        assert less["kl"] <= more["kl"] + 1e-6  # float32
        assert less["nll_student"] == more["nll_student"]
    assert far["splits"][0]["greedy_same"] is None


def _pictured(report) -> float:
    """Mean KL on questions with a picture; the one without is unlike what the model was trained on."""
    return next(row["kl"]["mean"] for row in report["splits"] if row["split"] == "with picture")


def test_packed_weights_are_those_of_the_dequantised_twin(rounded, tmp_path):
    from transformers import Qwen2VLForConditionalGeneration

    dequantize(rounded[4], tmp_path / "twin")
    twin = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "twin", dtype=torch.bfloat16).state_dict()
    found = load_model(rounded[4], torch.bfloat16, "cpu").state_dict()
    assert found.keys() == twin.keys()
    assert all(torch.equal(found[name], value) for name, value in twin.items())


def test_second_run_takes_the_16_bit_model_from_the_cache(demo_model, rounded, evaluation, tmp_path, loaded):
    settings = CompareSettings(device="cpu", max_new_tokens=4)
    said = []
    runs = [
        compare(str(demo_model), rounded[bits], evaluation, settings, tmp_path, say=said.append) for bits in (2, 2, 4)
    ]
    assert loaded == ["model", "2", "2", "4"]
    assert [run.pop("teacher_from_cache") for run in runs] == [False, True, True]
    assert runs[0] == runs[1] and runs[0]["rows"] != runs[2]["rows"]
    assert len(said) == 2 and "scores come from" in said[0]


def test_stale_and_damaged_caches_are_noticed(demo_model, evaluation, tmp_path, loaded):
    """Other weights of the same names, sizes and headers, another setting, other data, and a file cut short."""
    from safetensors.torch import load_file, save_file

    model, cache = shutil.copytree(demo_model, tmp_path / "copy"), tmp_path / "cache"
    said = []

    def run(new_tokens=0, data=evaluation):
        loaded.clear()
        settings = CompareSettings(device="cpu", max_new_tokens=new_tokens, samples=2)
        report = compare(str(model), demo_model, data, settings, cache, say=said.append)
        return report["splits"][0]["nll_teacher"]["mean"], list(loaded)

    before, both = run()
    assert both == ["copy", "model"] and said == []
    assert run() == (before, ["model"])
    weights = model / "model.safetensors"
    size, tensors = weights.stat().st_size, load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] / 2}, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    after, names = run()
    assert after != before and names == both and "other model files" in said[-1]
    assert run(new_tokens=1)[1] == both and "other settings" in said[-1]
    other = evaluation.parent / "reversed.jsonl"
    other.write_text("\n".join(evaluation.read_text().splitlines()[::-1]))
    assert run(data=other)[1] == both and "other data" in said[-1]
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert run() == (after, both) and "is damaged; the 16-bit model is run again" in said[-1]
