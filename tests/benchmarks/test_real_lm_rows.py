"""The tables of the real language model's benchmark, by hand."""

import sys

import pytest

from benchmark_modules import FOLDER

sys.path.insert(0, f"{FOLDER}/real_lm")
import rows  # noqa: E402


def row(name, seed, texts, pictures):
    found = {"bits": 2, "calibration": "both", "name": name, "seed": seed, "cpu_seconds": 10.0 * seed}
    for kind, values in (("text", texts), ("picture", pictures)):
        found |= {f"{kind}_kl": sum(values) / len(values), f"{kind}_kl_error": 0.01, f"{kind}_kls": values}
        found |= {f"{kind}_top1": 50.0, f"{kind}_top1_error": 1.0}
    return found


ROWS = [
    row("ours", 1, [1.0, 3.0], [0.5, 0.5]),
    row("ours", 2, [2.0, 2.0], [0.5, 0.5]),
    row("other", 1, [1.5, 3.1], [0.7, 0.5]),
    row("other", 2, [2.5, 2.9], [0.9, 0.5]),
    row("other", 3, [9.0, 9.0], [9.0, 9.0]),  # no such seed of the reference
]


def test_differences_are_those_of_the_same_chats_and_seeds():
    # text: chat 1 has +0.5 and +0.5, chat 2 +0.1 and +0.9: means 0.5 and 0.5. Pictures: 0.3 and 0, whose standard
    # deviation is 0.2121, over the root of 2
    lines = rows.differences(ROWS, "ours").splitlines()
    assert lines[2:] == ["| 2 | both | other | 2 | +0.5000 (0.0000) | +0.1500 (0.1500) |"]
    assert rows.differences(ROWS, "nobody").splitlines()[2:] == []


def test_a_table_has_means_over_seeds_and_the_larger_spread():
    lines = rows.table(ROWS[:2]).splitlines()
    assert lines[2:] == ["| 2 | both | ours | 2 | 2.0000 (0.0100) | 50.0 (1.0) | 0.5000 (0.0100) | 50.0 (1.0) | 15 |"]


def test_a_file_of_rows_is_completed_and_not_mixed(tmp_path):
    about = {"bits": 2, "calibration": "both", "name": "ours", "seed": 1}
    first = rows.Rows(tmp_path / "rows.jsonl")
    assert not first.has(about)
    first.add(about | {"settings": {"bits": 2}})
    again = rows.Rows(tmp_path / "rows.jsonl")
    assert again.has(about | {"settings": {"bits": 2}}) and not again.has(about | {"seed": 2})
    with pytest.raises(SystemExit, match="with other settings"):
        again.has(about | {"settings": {"bits": 3}})
