"""From a budget to a method and to a recipe: by hand on made-up sizes, and on a tiny model."""

import json

import pytest
import yaml

from family_studies import build_study
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.model.targets import Target
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.settings.recipe import read_recipe, settings_from
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep.mixtures import Budget, recipe_of
from vlmq_vllm.offline.sweep.parts import Part, Subject
from vlmq_vllm.offline.sweep.run import sweep
from vlmq_vllm.offline.sweep.sizes import linear_bits


def subject_of(shapes, component="language"):
    """Linears m.0, m.1 ... and each as a module."""
    targets = [
        Target(f"m.{i}", f"m.{i}", component, *shape, WeightFormat(2, -1, False)) for i, shape in enumerate(shapes)
    ]
    return Subject([], targets), [Part(target.name, (target.name,)) for target in targets]


def budget_of(shapes, levels, average):
    return Budget(*subject_of(shapes), levels, average)


def size_of(shapes, width):
    """Average bits per weight with every linear at one width."""
    targets = subject_of(shapes)[0].targets
    return sum(linear_bits(t, width) for t in targets) / sum(t.rows * t.columns for t in targets)


SHAPES = [(32, 64), (16, 64), (48, 128), (8, 128), (32, 32)]


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1]], ids=["five modules", "one"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_random_mixture_is_expected_between_the_uniform_ones(shapes, share):
    """At the share of the way from one size to the next, the same share from one KL to the next; doubles."""
    uniform = {2: 0.9, 3: 0.3, 4: 0.02}
    for narrow, wide in ((2, 3), (3, 4), (4, 16)):
        low, high = size_of(shapes, narrow), size_of(shapes, wide)
        budget = budget_of(shapes, (2, 3, 4, 16), low + share * (high - low))
        kl, next_kl = uniform[narrow], uniform.get(wide, 0.0)
        assert budget.expected(uniform) == pytest.approx(kl + share * (next_kl - kl), abs=1e-9)


def test_a_recipe_holds_widths_and_leaves_the_method_to_the_tool():
    subject, parts = subject_of([(32, 64), (16, 64), (8, 128)])
    widths = {"m.0": 3, "m.1": 2, "m.2": 16}
    settings = StudySettings(bits=(2, 3), methods=("gptq",), group_size=32, symmetric=True)
    expected = {"bits": 3, "group_size": 32, "symmetric": True, "modules": {"m.1": 2, "m.2": 16}}
    found = recipe_of(subject, widths, settings, calibrated=True)
    assert found == expected
    assert recipe_of(subject, widths, settings, calibrated=False) == expected | {"method": "rtn"}
    default = Settings(bits=3, group_size=32, symmetric=True, modules={"m.1": 2, "m.2": 16})
    assert settings_from(found, {}) == default
    assert settings_from(found, {"method": "awq"}).method == "awq"


def test_a_recipe_of_the_tower_alone_leaves_the_decoder():
    subject, _ = subject_of([(32, 64), (16, 64)], "vision")
    found = recipe_of(subject, {"m.0": 3, "m.1": 16}, StudySettings(bits=(3, 4)), calibrated=True)
    settings = settings_from(found, {})
    assert settings.format_for("language", "layers.0.q_proj") is None
    assert settings.format_for("vision", "m.0").bits == 3 and settings.format_for("vision", "m.1") is None


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return build_study("internvl", tmp_path_factory.mktemp("internvl"))


def test_the_method_is_the_one_that_does_best_at_the_budgets_size(given, tmp_path):
    """Rows are there already, made up: rounding to nearest is better at 2 bits, GPTQ at 3. Sizes of everything: about
    2.2, 3.2 and 16 bits."""
    settings = StudySettings(bits=(2, 3), by="third", group_size=-1)
    given = (str(given.model), given.held_out, given.calibration, tmp_path / "study")
    sweep(*given, settings)
    path = tmp_path / "study/study.json"
    study = json.loads(path.read_text())
    rows = study["rows"]
    kl = {("rtn", "all 2"): 0.1, ("gptq", "all 2"): 0.4, ("rtn", "all 3"): 0.05, ("gptq", "all 3"): 0.01}
    sizes = {row["label"]: row["bits_per_weight"] for row in rows}
    rows = [row | {"kl": kl.get((row["method"], row["label"]), row["kl"])} for row in rows]
    path.write_text(json.dumps(study | {"rows": rows}))
    # from 0.1 to 0.05 and from 0.4 to 0.01: they meet 15/17 of the way from 2 to 3 bits
    for share, expected in ((0.5, "rtn"), (0.95, "gptq")):
        average = round(sizes["all 2"] + share * (sizes["all 3"] - sizes["all 2"]), 3)
        found = sweep(*given, StudySettings(**vars(settings) | {"budget": average}), resume=True)
        assert found["mixture"]["method"] == expected
        assert found["mixture"]["row"]["label"] == f"mixture within {average} bits"
    report = (tmp_path / "study/report.md").read_text()
    assert "Of the methods gptq would do best in a random mixture of this size" in report
    assert "recipe.yaml holds these widths alone" in report


def test_a_study_without_calibration_data_has_a_recipe_that_needs_none(vlmq, given, tmp_path):
    more = (
        "--methods",
        "rtn",
        "--by",
        "third",
        "--bits",
        "3",
        "--group-size",
        -1,
        "--budget",
        "3.5",
        "--device",
        "cpu",
    )
    study = ("sweep", given.model, "--data", given.held_out, "-o", tmp_path / "study", *more)
    code, printed, said = vlmq(*study)
    assert code == 0, said
    recipe = tmp_path / "study/recipe.yaml"
    assert f"Use it: vlmq quantize {given.model} -o OUT --recipe {recipe}" in printed
    assert yaml.safe_load(recipe.read_text())["method"] == "rtn"
    assert read_recipe(recipe).keys() == {"bits", "group_size", "symmetric", "method", "modules"}
    code, _, said = vlmq("quantize", given.model, "-o", tmp_path / "out", "--recipe", recipe, "--device", "cpu")
    assert code == 0, said
    report = (tmp_path / "study/report.md").read_text()
    assert "`vlmq quantize MODEL -o OUT --recipe recipe.yaml` makes a checkpoint of it" in report
