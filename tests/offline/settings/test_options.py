"""Options are declared once: what a settings class says is what commands offer, show and use; methods are data."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import BITS as WIDTHS
from vlmq_vllm.offline.commands.app import app
from vlmq_vllm.offline.commands.options import settings_of, takes
from vlmq_vllm.offline.settings.compare import CompareSettings
from vlmq_vllm.offline.settings.methods import METHODS, TOKEN_WEIGHTS, defaults_of
from vlmq_vllm.offline.settings.option import check_options, option, options_of
from vlmq_vllm.offline.settings.quantize import BITS, Settings
from vlmq_vllm.offline.settings.recipe import settings_from
from vlmq_vllm.offline.settings.sweep import StudySettings

OFFLINE = Path(__file__).parents[3] / "offline"
TAKERS = {"quantize": Settings, "plan": Settings, "sweep": StudySettings, "compare": CompareSettings}


@pytest.mark.parametrize("name", TAKERS)
def test_a_command_offers_what_its_settings_declare(name):
    command = typer.main.get_command(app).commands[name]
    offered = {parameter.name: parameter for parameter in command.params}
    for declared in options_of(TAKERS[name]).values():
        if declared.recipe_only:
            assert declared.name not in offered
            continue
        parameter = offered[declared.name]
        several = declared.several and declared.default is not None
        default = ",".join(map(str, declared.default)) if several else declared.default
        assert parameter.default == default and parameter.help == declared.help
        assert parameter.opts == ["--" + declared.name.replace("_", "-")]
        assert all(str(choice) in parameter.metavar for choice in declared.choices)


@pytest.mark.parametrize("default", [7, 9])
def test_a_changed_default_changes_the_program_and_its_help(default):
    @dataclass(frozen=True)
    class Some:
        size: int = option(default, "How large.", least=1)
        names: tuple[str, ...] = option(("a", "b"), "Which.", ("a", "b", "c"))

        def __post_init__(self):
            check_options(self)

    some = typer.Typer()

    @some.command()
    @takes(Some)
    def show(must: str, **settings):
        typer.echo(json.dumps(vars(settings_of(Some, settings)) | {"must": must}))

    run = CliRunner().invoke
    assert json.loads(run(some, ["x"]).output) == {"size": default, "names": ["a", "b"], "must": "x"}
    assert json.loads(run(some, ["x", "--names", "c, a"]).output)["names"] == ["c", "a"]
    assert f"[default: {default}]" in run(some, ["--help"]).output
    for arguments, words in ((["--size", "0"], "size is 0; it must be at least 1"), (["--names", "d"], "names is d")):
        error = run(some, ["x", *arguments]).exception
        assert isinstance(error, QuantizeError) and words in str(error)


def test_plan_takes_every_setting_of_a_run(vlmq, demo_model):
    """Also those that a plan only gets to stay with the run's command line."""
    arguments = (
        "--base",
        "gptaq",
        "--group-size",
        64,
        "--damp",
        "0.02",
        "--samples",
        16,
        "--max-tokens",
        256,
        "--grid",
        "minmax",
        "--json",
    )
    made = [json.loads(vlmq("plan", demo_model, "--act-order", order, *arguments)[1]) for order in ("static", "none")]
    assert made[0]["settings"]["act_order"] == "static" and made[1]["settings"]["act_order"] == "none"
    assert made[0]["settings"]["damp"] == 0.02 and made[0]["settings"]["grid"] == "minmax"


def test_every_width_of_the_format_has_defaults():
    assert BITS == WIDTHS
    for method in METHODS:
        for bits in BITS:
            settings = Settings(method=method, bits=bits)
            assert {name: getattr(settings, name) for name in defaults_of(method, bits)} == defaults_of(method, bits)


def test_rows_name_what_there_is():
    names = set(options_of(Settings))
    for row in METHODS.values():
        assert set(row.token_weights) <= set(TOKEN_WEIGHTS) and set(row.options) | set(row.defaults) <= names
    assert all(set(row.options) <= names for row in TOKEN_WEIGHTS.values())


def test_nothing_but_the_table_compares_names_of_methods():
    found = []
    for path in sorted(OFFLINE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                names = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
                words = {one.value for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant)}
                if names & {"method", "methods"} and words & set(METHODS):
                    found.append(f"{path.relative_to(OFFLINE)}:{node.lineno}")
    assert found == []


def test_recipes_of_version_0_1_mean_qep():
    assert settings_from({"base": "aligned"}, {}) == Settings(base="qep")
    assert settings_from({"base": "aligned", "saliency_cap": 0.0}, {}).saliency_cap == 0
    with pytest.raises(QuantizeError, match="multiples of the mean; they are of the median now"):
        settings_from({"base": "aligned", "saliency_cap": 5.0}, {})
    with pytest.raises(QuantizeError, match="base is aligned; choose one of gptq, gptaq, qep"):
        Settings(base="aligned")
