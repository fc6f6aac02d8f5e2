"""The folder of a study: what is refused, what a kill leaves, and what a message names."""

import errno
import fcntl
import json
import os

import pytest
from safetensors import SafetensorError

from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.offline.sweep.results import Results

ROW = {"method": "rtn", "label": "all 2", "bits_per_weight": 2.5, "bits_per_parameter": 3.0}
ROW |= {"kl": 0.5, "kl_error": None, "nll": 1.0, "exact": 0.5}
BEGUN = {"model": "1", "held-out": "2", "calibration": "3", "max_pixels": 0, "group_size": 128, "symmetric": False}
BEGUN |= {"components": ["vision", "language"], "version": "1.0"}


def begun(folder, rows=(), identity=BEGUN):
    """The folder of a study with rows of these keys."""
    with Results(folder, resume=False) as results:
        results.begin(identity)
        for key in rows:
            results.add(ROW | {"key": key})
    return folder


def test_a_study_is_the_same_when_it_is_opened_again(tmp_path):
    folder = begun(tmp_path / "s", "ab")
    with Results(folder, resume=True) as results:
        assert results.identity == BEGUN
        results.begin(BEGUN)
        assert results.rows == {("rtn", key): ROW | {"key": key} for key in "ab"}
    assert sorted(path.name for path in folder.iterdir()) == ["study.json"]


def test_what_a_kill_left_before_the_identity_counts_as_nothing(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "study.json.partial").write_text('{"mod')
    begun(folder)
    assert [path.name for path in folder.iterdir()] == ["study.json"]


def test_places_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for place, message in (
        ("file", "file exists already"),
        ("mine", "mine is no folder of a study; choose another"),
        ("none/s", "none is not a folder"),
    ):
        with pytest.raises(QuantizeError, match=message):
            Results(tmp_path / place, resume=True)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(RefusedError, match="holds a study already; add --resume"):
        Results(begun(tmp_path / "s"), resume=False)
    lock = os.open(tmp_path / "s", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RefusedError, match="another process is writing"):
        Results(tmp_path / "s", resume=True)
    os.close(lock)
    with Results(tmp_path / "s", resume=True):
        pass


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_new_folder_goes_away_when_nothing_was_begun(tmp_path, there):
    folder = tmp_path / "s"
    if there:
        folder.mkdir()
    with pytest.raises(QuantizeError, match="no chat"), Results(folder, resume=False):
        assert folder.is_dir()
        raise QuantizeError("no chat")
    assert folder.is_dir() == there


@pytest.mark.parametrize("content", ["", '{"identity": {}', "[]", "\0" * 9, '{"identity": {}}', '{"rows": []}'])
def test_a_damaged_study_is_named_and_left(tmp_path, content):
    path = begun(tmp_path / "s", "ab") / "study.json"
    path.write_text(content)
    with pytest.raises(RefusedError, match=r"s/study\.json is damaged; remove .*s to begin anew, or choose another"):
        Results(tmp_path / "s", resume=True)
    assert path.read_text() == content


OTHERS = {  # entries, what the message says
    "held out": ({"held-out": "5"}, "another held-out: give the same --data, --samples and --seed, with their files"),
    "calibration": ({"calibration": "4"}, "another calibration: give the same --calibration, --calibration-samples"),
    "none": ({"calibration": None, "max_pixels": None}, "another calibration: give the same --calibration,"),
    "model": ({"model": "4"}, "another model: give the same MODEL, with their files as they were"),
    "option": ({"symmetric": True}, "had symmetric False, this run has True; give the same"),
    "parts": ({"components": ["vision"]}, r"had components \['vision', 'language'\], this run has \['vision'\]"),
    "version": ({"version": "2.0"}, "had version 1.0, this run has 2.0; give the same, or choose"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_study_is_refused_with_what_differs(tmp_path, name):
    entries, message = OTHERS[name]
    folder = begun(tmp_path / "s")
    content = (folder / "study.json").read_bytes()
    with Results(folder, resume=True) as results, pytest.raises(RefusedError, match=message) as refused:
        results.begin(BEGUN | entries)
    assert "choose another folder" in str(refused.value) and (folder / "study.json").read_bytes() == content


def test_a_study_without_calibration_gets_it_later_and_keeps_it(tmp_path):
    bare = BEGUN | {"calibration": None, "max_pixels": None}
    folder = begun(tmp_path / "s", identity=bare)
    with Results(folder, resume=True) as results, pytest.raises(RefusedError, match="group_size 128"):
        results.begin(BEGUN | {"group_size": 64})
    for identity in (bare, BEGUN, BEGUN):
        with Results(folder, resume=True) as results:
            results.begin(identity)
    assert json.loads((folder / "study.json").read_text())["identity"] == BEGUN
    with Results(folder, resume=True) as results, pytest.raises(RefusedError, match="has another calibration"):
        results.begin(bare)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_full_disk_is_said_in_one_line(tmp_path, error):
    for place, resume, advice in (("s", False, "make room and run again"), ("t", True, "and add --resume to go on")):
        folder = begun(tmp_path / place) if resume else tmp_path / place
        with pytest.raises(RefusedError, match=f"no space left while writing .*; .*{advice}"), Results(folder, resume):
            raise error
    with pytest.raises(type(error), match="something else"), Results(tmp_path / "t", True):
        raise type(error)("something else")
