"""The folder of a study: what is refused, what a kill leaves, and which options a message names."""

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
ASKED = {"model": "m", "data": "d", "calibration": "c", "seed": 42, "samples": None, "calibration_samples": 8}
ASKED |= {"group_size": 128, "symmetric": False, "max_pixels": 0, "components": ["vision", "language"]}
BEGUN = {"model": "1", "held-out": "2", "calibration": "3", "max_pixels": 0, "group_size": 128, "symmetric": False}
BEGUN |= {"components": ["vision", "language"], "version": "1.0", "asked": ASKED}


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
    assert sorted(path.name for path in folder.iterdir()) == ["identity.json", "results.jsonl"]


def test_what_a_kill_left_before_the_identity_counts_as_nothing(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "identity.json.partial").write_text('{"mod')
    begun(folder)
    assert [path.name for path in folder.iterdir()] == ["identity.json"]


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


@pytest.mark.parametrize("tail", ['{"method": "rt', '{"method": "rt\n', "\0" * 30, "\0\n", '{"method": "rtn"}\n'])
def test_a_torn_last_line_is_measured_again(tmp_path, tail):
    path = begun(tmp_path / "s", "ab") / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode())
    with Results(tmp_path / "s", resume=True) as results:
        assert [key for _, key in results.rows] == ["a", "b"] and path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # a whole object, but another line would follow on the same one
    with Results(tmp_path / "s", resume=True) as results:
        assert [key for _, key in results.rows] == ["a"]


@pytest.mark.parametrize("line", ['{"method": "rt', "", "[1]", "\xff", '{"method": "rtn", "key": "b"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = begun(tmp_path / "s", "abc") / "results.jsonl"
    lines = path.read_text().splitlines()
    content = "\n".join([lines[0], line, lines[2], ""]).encode("latin-1")
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=r"s/results\.jsonl is damaged in line 2; remove that line, and --resume"):
        Results(tmp_path / "s", resume=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"model": "1"', b"[]", b"\0" * 9, b"\xff"])
def test_a_damaged_identity_is_named(tmp_path, content):
    (begun(tmp_path / "s") / "identity.json").write_bytes(content)
    with pytest.raises(RefusedError, match=r"s/identity\.json is damaged.*; remove .*s to begin anew, or choose"):
        Results(tmp_path / "s", resume=True)


OTHERS = {  # entries, options, what the message says
    "seed": ({"calibration": "4", "held-out": "5"}, {"seed": 7}, "begun with --seed 42; this run has --seed 7: give"),
    "fewer": ({"calibration": "4"}, {"calibration_samples": 2}, "with --calibration-samples 8; .* --calibration-s.* 2"),
    "none": ({"calibration": None, "max_pixels": None}, {"calibration": None}, "--calibration c; .* no --calibration"),
    "drawn": ({"held-out": "5"}, {"samples": 3}, "begun with no --samples; this run has --samples 3: give"),
    "two": (
        {"held-out": "5", "symmetric": True},
        {"data": "e", "symmetric": True},
        "data d, no --symmetric; .* e, --s",
    ),
    "parts": (
        {"components": ["vision"]},
        {"components": ["vision"]},
        "--components vision,language; .* --comp.* vision:",
    ),
    "model": ({"model": "4"}, {"model": "n"}, "begun with MODEL m; this run has MODEL n"),
    "moved": ({"model": "4"}, {}, "contents of m: the files of the model have changed; put them back, or choose"),
    "other chats": ({"held-out": "5"}, {}, "contents of d: the held-out chats have changed"),
    "calibration chats": ({"calibration": "5"}, {}, "contents of c: the calibration chats have changed"),
    "version": ({"version": "2.0"}, {}, "begun with vlmq-vllm 1.0; here is 2.0: go on with what it was begun with, or"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_study_is_refused_with_the_options_that_differ(tmp_path, name):
    entries, options, message = OTHERS[name]
    folder = begun(tmp_path / "s")
    content = (folder / "identity.json").read_bytes()
    with Results(folder, resume=True) as results, pytest.raises(RefusedError, match=message) as refused:
        results.begin(BEGUN | entries | {"asked": ASKED | options})
    assert "choose another folder" in str(refused.value) and (folder / "identity.json").read_bytes() == content
    for option in ASKED.keys() - options.keys() - {"model", "data", "calibration"}:
        assert f"--{option.replace('_', '-')} " not in str(refused.value)


def test_options_that_decide_nothing_may_differ(tmp_path):
    folder = begun(tmp_path / "s")
    with Results(folder, resume=True) as results:
        results.begin(BEGUN | {"asked": ASKED | {"seed": 7, "data": "moved", "calibration_samples": 9}})
    assert json.loads((folder / "identity.json").read_text()) == BEGUN


def test_a_study_without_calibration_gets_it_later_and_keeps_it(tmp_path):
    bare = BEGUN | {"calibration": None, "max_pixels": None, "asked": ASKED | {"calibration": None}}
    folder = begun(tmp_path / "s", identity=bare)
    with Results(folder, resume=True) as results, pytest.raises(RefusedError, match="group-size 64"):
        results.begin(BEGUN | {"group_size": 64, "asked": ASKED | {"group_size": 64}})
    for identity in (bare, BEGUN, BEGUN):
        with Results(folder, resume=True) as results:
            results.begin(identity)
    assert json.loads((folder / "identity.json").read_text()) == BEGUN
    with Results(folder, resume=True) as results, pytest.raises(RefusedError, match="has no --calibration"):
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
