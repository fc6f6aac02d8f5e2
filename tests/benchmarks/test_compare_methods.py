"""The file of figures that benchmarks/quality/compare_methods.py and qvlm.py complete, and the table of it."""

import argparse
import json

import pytest

from benchmarks.quality import compare_methods


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(**options): the rows of the file after a run that measures kl = seed / 10 bits; whom it measured."""
    monkeypatch.setattr(compare_methods, "write", lambda folder, split, count: folder)

    def run(samples=8, **options):
        args = {"rows": tmp_path / "rows.jsonl", "label": "", "table": None, "methods": ["RTN", "AWQ"], "bits": [3]}
        seen = []

        def figures(pool, row):
            seen.append((row["bits"], row["name"], row["seed"]))
            return {"kl": row["seed"] / 10 / row["bits"], "nll": 1.0, "exact": 50.0}

        compare_methods.complete(
            argparse.Namespace(**args | {"seeds": [1, 2]} | options),
            lambda bits, name, seed: {"settings": {"group_size": -1, "samples": samples}},
            figures,
        )
        return [json.loads(line) for line in args["rows"].read_text().splitlines()], seen

    return run


def test_only_what_lacks_is_measured(measured):
    assert measured()[1] == [(3, "RTN", 1), (3, "AWQ", 1), (3, "AWQ", 2)]
    rows, seen = measured(bits=[3, 2], seeds=[2, 3])
    # rounding has no seed: the first of a run stands for it
    assert seen == [(3, "RTN", 2), (3, "AWQ", 3), (2, "RTN", 2), (2, "AWQ", 2), (2, "AWQ", 3)]
    assert [row["kl"] for row in rows[:3]] == [1 / 30, 1 / 30, 2 / 30]


def test_models_of_other_options_are_not_mixed(measured):
    measured()
    with pytest.raises(SystemExit, match="has RTN at 3 bits without .*'samples': 16.*give another file or --label"):
        measured(samples=16)
    rows, seen = measured(samples=16, label=", 16 chats")
    assert len(rows) == 6 and seen == [(3, "RTN, 16 chats", 1), (3, "AWQ, 16 chats", 1), (3, "AWQ, 16 chats", 2)]


def test_table_has_means_and_spreads(measured):
    lines = compare_methods.table(measured(bits=[4, 2])[0]).splitlines()[2:]
    assert lines[0] == "| 2 | row | RTN | 1 | 0.05000 | 1.0000 | 50.0 |"
    # of 1/20 and 2/20
    assert lines[1] == "| 2 | row | AWQ | 2 | 0.07500 (0.03536) | 1.0000 (0.0000) | 50.0 (0.0) |"
    assert [line.split(" | ")[0] for line in lines] == ["| 2", "| 2", "| 4", "| 4"]
