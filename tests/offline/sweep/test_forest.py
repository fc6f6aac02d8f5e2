"""Grids and random designs end to end, and what a report says of the forests that were fitted."""

from types import SimpleNamespace

import pytest

from family_studies import build_study
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep import forest as forest_module
from vlmq_vllm.offline.sweep import markdown
from vlmq_vllm.offline.sweep.designs import find_design
from vlmq_vllm.offline.sweep.forest import Forest, fit_forests
from vlmq_vllm.offline.sweep.parts import Part, label_of
from vlmq_vllm.offline.sweep.run import sweep

SECOND = "so that a second forest is fitted without them"
NONE = "and too few others that differ are left (12 are needed)"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return build_study("internvl", tmp_path_factory.mktemp("internvl"))


@pytest.mark.parametrize(
    ("design", "by", "runs", "rows", "expected"),
    [
        # 4 widths of 2 parts; without 2 bits 3^2 rows are left, too few
        ("grid", "kind", 128, [(16, None)], NONE),
        # 12 of 3 layers, 24 drawn ones and the model itself, some of which have no part at 2 bits
        ("random", "layer", 24, [(None, None), (None, 2)], SECOND),
    ],
)
def test_a_design_of_many_configurations_ends_in_forests(
    given, tmp_path, monkeypatch, design, by, runs, rows, expected
):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(forest_module, "TREES", 60)  # enough that every row is out of some bag, and quick
    monkeypatch.setattr(forest_module, "REPEATS", 3)
    settings = StudySettings(bits=(2, 3, 4), methods=("rtn",), by=by, design=design, runs=runs, group_size=-1)
    found = sweep(str(given.model), given.held_out, None, tmp_path / "study", settings)
    parts = [Part(name, ()) for name in found["parts"]]
    wanted = find_design(design, len(parts), settings.bits, runs, settings.seed)
    kl = {row["label"]: row["kl"] for row in found["rows"]}
    assert len(kl) == len(wanted)
    damage = {widths: kl[label_of(parts, widths)] for widths in wanted} | {(16,) * len(parts): 0.0}
    reference = fit_forests(damage, settings.bits, settings.seed)
    forests = found["forests"]["rtn"]
    assert len(forests) == len(rows) == len(reference)
    report = (tmp_path / "study/report.md").read_text()
    assert expected in report and "## What a random forest makes of it, rtn" in report
    for forest, same, (count, without) in zip(forests, reference, rows, strict=True):
        kept = [widths for widths in damage if without is None or without not in widths]
        assert forest["rows"] == len(kept) == (count or len(kept)) and forest["without"] == without
        assert forest["impurity"] == pytest.approx(same.impurity) and sum(forest["impurity"]) == pytest.approx(1)
        assert forest["permutation"] == pytest.approx(same.permutation)
        name = f"{len(kept)} without 2 bits" if without else f"{len(kept)}"
        cells = " | ".join(f"{100 * value:.1f}" for value in same.impurity)
        assert f"| {name} | {same.r2:.2f} | impurity, % | {cells} |" in report


def text_of(forests, bits):
    study = SimpleNamespace(settings=StudySettings(bits=bits), parts=[Part("one", ()), Part("other", ())])
    return markdown._forest(study, "rtn", forests)


def forest(without):
    return Forest(20, without, 0.5, [0.7, 0.3], [0.9, 0.1], [0.01, 0.02])


@pytest.mark.parametrize(
    ("withouts", "bits", "said"),
    [
        ([None, 2], (2, 3), {SECOND}),
        ([None], (2, 3), {NONE}),
        ([None], (3,), set()),  # nothing is left out of a single width
        ([], (2, 3), {"too few configurations that differ to fit one (it takes 12)"}),
    ],
    ids=["both", "one", "a single width", "none"],
)
def test_the_report_says_which_forests_were_fitted(withouts, bits, said):
    text = text_of([forest(without) for without in withouts], bits)
    every = {SECOND, NONE, "too few configurations that differ to fit one (it takes 12)"}
    assert {sentence for sentence in every if sentence in text} == said
    assert text.count("impurity, %") == len(withouts)
