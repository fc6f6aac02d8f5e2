"""`vlmq sweep` as a user meets it: what it prints, how it stops and goes on, and every mistake as one line."""

import json
import os
import re

import pytest

from vlmq_vllm.offline.commands import sweep as command
from vlmq_vllm.offline.sweep import run

BOTH = ("vision", "language")


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
    assert any(re.search(r"rtn 2 of 8: all 2: KL .*, in 0:\d\d:\d\d$", line) for line in said)
    code, printed, said = vlmq(*arguments, "--resume")
    assert code == 0 and "recipe.yaml" in printed and not any("of 8" in line for line in said)
    made = {"study.json", "pieces", "results.csv", "pareto.csv", "pareto.png", "report.md"}
    assert {path.name for path in (tmp_path / "study").iterdir()} == made | {"recipe.yaml"}
    code, printed, said = vlmq(*arguments[:-2], "--resume")
    assert code == 0 and "recipe" not in printed and not any("KL" in line for line in said)
    assert {path.name for path in (tmp_path / "study").iterdir()} == made
    assert "Mixture" not in (tmp_path / "study/report.md").read_text()


def test_a_study_that_was_damaged_goes_on_or_says_what_to_do(vlmq, demo_model, held_out, tmp_path):
    out = tmp_path / "study"
    arguments = asked(demo_model, held_out, out, "--bits", "2", "--components", "language")
    assert vlmq(*arguments)[0] == 0
    pieces = {path: path.read_bytes() for path in sorted(out.glob("pieces/rtn-2/*"))}
    cut = list(pieces)[1]
    os.truncate(cut, 1000)
    study = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(study | {"rows": []}))
    code, _, said = vlmq(*arguments, "--resume")
    assert code == 0 and f"vlmq: {cut} was damaged; it is made again when it is needed" in said
    assert {path: path.read_bytes() for path in pieces} == pieces
    assert json.loads((out / "study.json").read_text()) == study
    (out / "study.json").write_text("{")
    code, _, said = vlmq(*arguments, "--resume")
    assert code == 3 and said[-1].startswith("vlmq: error: ") and "study.json is damaged" in said[-1]


def test_a_resumed_study_keeps_its_components_and_names_options_that_differ(vlmq, demo_model, held_out, tmp_path):
    arguments = asked(demo_model, held_out, tmp_path / "study", "--bits", "4")
    code, printed, _ = vlmq(*arguments, "--components", "vision,language", "--json")
    before = json.loads(printed)
    code, printed, _ = vlmq(*arguments, "--by", "kind", "--resume", "--json")
    found = json.loads(printed)
    assert code == 0 and len(found["parts"]) == 4 and {part.split()[0] for part in found["parts"]} == set(BOTH)
    assert found["rows"][: len(before["rows"])] == before["rows"]
    for more, message in (
        (("--samples", 1), "has another held-out: give the same --data, --samples and --seed"),
        (
            ("--components", "language"),
            r"had components \['vision', 'language'\], this run has \['language'\]; give the same",
        ),
        (("--max-tokens", 1000, "--symmetric"), "had max_tokens 2048, this run has 1000; give the same"),
    ):
        code, _, said = vlmq(*arguments, *more, "--resume")
        assert code == 3 and re.search(message, said[-1]), said[-1]


def test_the_folder_is_looked_at_before_any_chat(vlmq, demo_model, held_out, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("")

    def never(*args):
        raise AssertionError("chats were read")

    monkeypatch.setattr(run, "read", never)
    monkeypatch.setattr(run, "Source", never)
    for place, expected, message in (("mine", 3, "is no folder of a study"), ("mine/notes", 2, "exists already")):
        code, _, said = vlmq(*asked(demo_model, held_out, tmp_path / place))
        assert code == expected and message in said[-1]


MISTAKES = {
    "bits that are no numbers": (["--bits", "few"], 2, "bits is 'few'; give numbers with commas between them"),
    "no calibration data": (["--methods", "gptq"], 2, "need calibration data; give --calibration FILE.jsonl"),
    "unknown method": (["--methods", "magic"], 2, "methods is magic; choose among rtn, awq, gptq"),
    "unknown component": (["--components", "sound"], 2, "components is sound; choose among language, vision"),
    "budget without any saving": (["--budget", "16"], 2, "budget is 16.0; give average bits per weight below 16"),
    "budget out of reach": (
        ["--bits", "3", "--budget", "2.5"],
        3,
        "cannot be met with 3 bits and scales: give 3.16 or more",
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
    assert not (tmp_path / "study").exists()
