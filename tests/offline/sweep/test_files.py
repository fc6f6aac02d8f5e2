"""Files of a study that are whole or not at all: pieces, and what a run reports."""

import os
import resource
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.format import QuantizedWeight, WeightFormat
from vlmq_vllm.offline.checkpoint.atomic import aside
from vlmq_vllm.offline.model.targets import Target, Unit
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep import pieces as module
from vlmq_vllm.offline.sweep import report
from vlmq_vllm.offline.sweep.markdown import markdown
from vlmq_vllm.offline.sweep.parts import Part, label_of, one_at_a_time
from vlmq_vllm.offline.sweep.pieces import Pieces
from vlmq_vllm.offline.sweep.results import Results

UNIT = Unit("language-00000", "language", "layers.0", 0)
PARTS = [Part("one", ("a",)), Part("two", ("b",))]
SHAPES = [(1, 32), (7, 96), (33, 64)]


def target_of(name, shape):
    return Target(name, name, "language", *shape, WeightFormat(4, 32, False))


def weights_of(shape, bits):
    """A linear in codes and one that was scaled."""
    rows, columns = shape
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 32).half()
    zero = torch.randint(2**bits, scale.shape, dtype=torch.uint8)
    return {
        "codes": QuantizedWeight(WeightFormat(bits, 32, False), codes, scale, zero),
        "scaled": torch.randn(shape).bfloat16(),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_pieces_come_back_as_they_are_served(tmp_path, shape, bits):
    weights, kind = weights_of(shape, bits), ("awq", bits)
    Pieces(tmp_path).write(kind, UNIT, weights)
    codes = weights["codes"]
    of = torch.arange(shape[1]) // 32
    expected = ((codes.codes.float() - codes.zero.float()[:, of]) * codes.scale.float()[:, of]).half()
    assert torch.equal(Pieces(tmp_path).read(kind, UNIT, target_of("codes", shape)), expected)
    assert torch.equal(Pieces(tmp_path).read(kind, UNIT, target_of("scaled", shape)), weights["scaled"])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["language-00000.safetensors"]


def test_a_disk_that_gives_other_bits_back_leaves_the_piece_that_was_there(tmp_path, monkeypatch):
    pieces, weights = Pieces(tmp_path), weights_of((7, 96), 2)
    pieces.write(("rtn", 2), UNIT, weights)
    before = pieces.file(("rtn", 2), UNIT).read_bytes()

    def flipping(tensors, path):
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(module, "save_file", flipping)
    for bits in (2, 3):
        with pytest.raises(RefusedError, match="reads back from .* with other bits: the disk fails"):
            pieces.write(("rtn", bits), UNIT, weights)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [pieces.file(("rtn", 2), UNIT)] and files[0].read_bytes() == before


def test_a_piece_that_is_cut_short_is_dropped_and_a_sound_one_stays(tmp_path):
    pieces = Pieces(tmp_path)
    for bits in (2, 3, 4):
        pieces.write(("rtn", bits), UNIT, weights_of((7, 96), bits))
    cut, empty = (pieces.file(("rtn", bits), UNIT) for bits in (2, 4))
    os.truncate(cut, cut.stat().st_size - 1)
    os.truncate(empty, 0)
    assert pieces.drop_damaged() == [cut, empty] and pieces.drop_damaged() == []
    assert [*tmp_path.rglob("*.safetensors")] == [pieces.file(("rtn", 3), UNIT)]


@pytest.mark.parametrize("what", ["piece", "row"])
def test_no_room_for_a_file_is_one_line_and_leaves_whole_files(tmp_path, what):
    """A limit of files' sizes is what a test can set; its error is told apart from others as that of a full disk is."""
    row = dict.fromkeys(("method", "key", "label", "bits_per_weight", "bits_per_parameter"), "x" * 500)
    row |= dict.fromkeys(("kl", "kl_error", "nll", "exact"), 0.0)
    refused = pytest.raises(RefusedError, match=r"no space left while writing .*s; make room and add --resume to go on")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with refused, Results(tmp_path / "s", resume=False) as results:
            results.begin({"model": "1"})
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            if what == "row":
                results.add(row)
            Pieces(tmp_path / "s/pieces").write(("rtn", 3), UNIT, weights_of((33, 64), 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.rglob("*.partial")] and not [*tmp_path.rglob("*.safetensors")]
    with Results(tmp_path / "s", resume=True) as results:
        results.add(row)
    with Results(tmp_path / "s", resume=True) as results:
        assert list(results.rows.values()) == [row]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a", []

    def note(number):
        at = Path(f"/proc/self/fd/{number}")
        synced.append((at.resolve().name, at.read_text(), path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    with aside(path) as partial:
        partial.write_text("text")
    assert synced == [("a.partial", "text", False)] and path.read_text() == "text"
    with pytest.raises(ValueError, match="in between"), aside(path) as partial:
        partial.write_text("other")
        raise ValueError("in between")
    assert path.read_text() == "text" and [*tmp_path.iterdir()] == [path]


def study_of(budget):
    """Two parts by one method at 2 and 4 bits; a recipe where there is a budget."""
    figures = {"kl_error": None, "nll": 1.0, "exact": 0.5}
    rows = [
        {"method": "rtn", "key": str(i), "label": label_of(PARTS, widths), "bits_per_weight": sum(widths) / 2}
        | {"bits_per_parameter": 8.0, "kl": 16 / sum(widths)}
        | figures
        for i, widths in enumerate(one_at_a_time(2, (2, 4)))
    ]
    base = {"method": "none", "key": "", "label": "16 bits", "bits_per_weight": 16.0, "bits_per_parameter": 16.0}
    rises = {"one": {2: 0.9, 4: 0.8}, "two": {2: 0.7, 4: 0.6}}
    mixture = {"method": "rtn", "widths": {"one": 2, "two": 4}, "rises": rises, "sum_of_rises": 1.5, "pooled": []}
    mixture |= {"row": rows[0], "recipe": {"bits": 2, "modules": {"b": 4}}}
    found = {"model": "m", "data": "d", "calibration": None, "questions": 1, "pictured": 1}
    found |= {"settings": asdict(StudySettings(bits=(2, 4), budget=budget)), "shares": [0.25, 0.75]}
    found |= {"full_precision": base | {"kl": 0.0} | figures, "rows": rows, "pareto": rows[:1], "rises": {"rtn": rises}}
    return found | ({"mixture": mixture} if budget else {})


def test_a_report_has_what_was_found():
    text = markdown(study_of(3.5))
    assert "| one | 25.0 | 0.8 | 0.9 |" in text and "| two | 75.0 | 0.6 | 0.7 |" in text  # shares, KL at 4 and 2 bits
    assert "| rtn | all 4 | 4.000 | 8.000 | 2 | 1.0000 | 50.0 |" in text
    assert (
        "Widths of 2 modules with the least sum of KL alone (1.5 in sum;" in text and "| two | 4 | 0.6 | 0.7 |" in text
    )
    assert "measured worse" not in text and "would do best" not in text


def test_all_files_are_of_the_same_run(tmp_path, monkeypatch):
    made = {"results.csv", "pareto.csv", "report.md"}
    monkeypatch.setattr(report, "draw", lambda path, rows: path.write_text(f"picture of {len(rows)}"))
    monkeypatch.setattr(report, "find_spec", lambda name: SimpleNamespace())
    report.write(tmp_path, study_of(3.5))
    assert {path.name for path in tmp_path.iterdir()} == made | {"pareto.png", "recipe.yaml"}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {"bits": 2, "modules": {"b": 4}}
    assert (tmp_path / "pareto.png").read_text() == "picture of 6"
    assert "## Mixture" in (tmp_path / "report.md").read_text()
    (tmp_path / "study.json").write_text("")  # no report: it stays
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.write(tmp_path, study_of(None))
    assert {path.name for path in tmp_path.iterdir()} == made | {"study.json"}
    assert "## Mixture" not in (tmp_path / "report.md").read_text()


def test_a_report_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    report.write(tmp_path, study_of(3.5))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def torn(path, rows):
        path.write_text("half")
        raise OSError("interrupted")

    for name in ("_csv", "draw"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="interrupted"):
            patch.setattr(report, name, torn)
            report.write(tmp_path, study_of(3.5))
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
