"""`vlmq sweep` as a user meets it: what it prints, how it stops and goes on, and every mistake as one line."""

import json

import pytest

from vlmq_vllm.offline.commands import sweep as command


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    from data import write

    return write(tmp_path_factory.mktemp("held-out"), "evaluation", 2)


def asked(model, held_out, out, *more):
    return ("sweep", model, "--data", held_out, "-o", out, "--methods", "rtn", "--device", "cpu", *more)


def test_a_study_is_stopped_goes_on_and_prints_json(vlmq, demo_model, held_out, tmp_path, monkeypatch):
    arguments = asked(demo_model, held_out, tmp_path / "study", "--bits", "2, 4", "--by", "third", "--budget", 3)
    answers = iter([False] * 5)
    with monkeypatch.context() as patch:
        patch.setattr(command, "stop_on_sigterm", lambda: lambda: next(answers, True))
        code, _, said = vlmq(*arguments)
    assert code == 75 and "add --resume to the same command to go on" in said[-1]
    code, _, said = vlmq(*arguments)
    assert code == 3 and "holds a study already; add --resume" in said[-1]
    code, printed, said = vlmq(*arguments, "--resume", "--json")
    found = json.loads(printed)
    assert code == 0 and found["parts"] == ["front", "middle", "end"]
    assert [row["label"] for row in found["rows"][:3]] == ["all 4", "all 2", "front 4, others 16"]
    assert found["mixture"]["row"]["bits_per_weight"] <= 3
    assert any("rtn 2 of 8: all 2: KL" in line for line in said)
    code, printed, said = vlmq(*arguments, "--resume")
    assert code == 0 and "recipe.yaml" in printed and not any("of 8" in line for line in said)
    made = {"identity.json", "pieces", "results.jsonl", "results.csv", "pareto.csv", "pareto.png", "report.md"}
    assert {path.name for path in (tmp_path / "study").iterdir()} == made | {"recipe.yaml"}


MISTAKES = {
    "bits that are no numbers": (["--bits", "few"], 2, "bits is 'few'; give numbers with commas between them"),
    "no calibration data": (["--methods", "gptq"], 2, "need calibration data; give --calibration FILE.jsonl"),
    "unknown method": (["--methods", "magic"], 2, "methods is magic; choose among rtn, awq, gptq"),
    "unknown component": (["--components", "sound"], 2, "components is sound; choose among language, vision"),
    "grid that is too large": (["--by", "layer", "--design", "grid"], 3, "has 255 configurations, more than --runs"),
    "budget out of reach": (
        ["--bits", "3", "--budget", "2.5"],
        3,
        "cannot be met with 3 bits and scales: give 16 down",
    ),
    "questions that are too long": (["--max-tokens", "5"], 2, "no held-out chat has at most 5 tokens"),
    "no such device": (["--device", "cuda:77"], 2, "device 'cuda:77' cannot be used"),
    "no data": (["--data", "none.jsonl"], 2, "none.jsonl: it does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(vlmq, demo_model, held_out, tmp_path, name):
    more, expected, message = MISTAKES[name]
    code, printed, said = vlmq(*asked(demo_model, held_out, tmp_path / "study", *more))
    assert code == expected and not printed
    assert said[-1].startswith("vlmq: error: ") and message in said[-1]
