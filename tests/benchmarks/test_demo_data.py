"""The demo's pictures: repeatable, and never shared between training, calibration and evaluation."""

import hashlib

from pictures import TASKS, ask, draw


def fingerprint(image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_splits_share_no_picture():
    splits = {
        "train": {fingerprint(draw("train", i).image) for i in range(300)},
        "calibration": {fingerprint(ask("calibration", i)[0]) for i in range(128)},
        "evaluation": {fingerprint(ask("evaluation", i)[0]) for i in range(300)},
    }
    assert [len(found) for found in splits.values()] == [300, 128, 300]
    assert len(set.union(*splits.values())) == 728


def test_a_picture_can_be_drawn_again():
    first, second = draw("train", 7), draw("train", 7)
    assert fingerprint(first.image) == fingerprint(second.image)
    assert first.questions == second.questions


def test_every_task_is_asked_equally_often():
    asked = [ask("evaluation", i)[1].task for i in range(70)]
    assert {task: asked.count(task) for task in TASKS} == dict.fromkeys(TASKS, 10)
