"""A study of what only pictures reach needs held-out chats with pictures."""

import pytest

from family_studies import build_study
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.compare.questions import Question
from vlmq_vllm.offline.data.inputs import load_processor, prepare
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep.run import sweep


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return build_study("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


def settings(**options):
    return StudySettings(bits=(2,), methods=("rtn",), group_size=-1, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "vision and connector"),
        ({"components": ("vision",)}, "vision"),
        ({"components": ("connector",)}, "connector"),
    ],
    ids=["by component", "vision", "connector"],
)
def test_chats_without_pictures_say_nothing_about_what_sees_them(given, tmp_path, options, named):
    message = (
        f"no held-out chat with a picture has at most 2048 tokens, so that nothing is known of {named}; give --data "
        "with pictures, raise --max-tokens, or study --components language alone"
    )
    with pytest.raises(QuantizeError, match=f"^{message}$"):
        sweep(str(given.model), given.text, None, tmp_path / "study", settings(**options))
    assert not (tmp_path / "study").exists()


def test_the_decoder_is_studied_on_text_alone(given, tmp_path):
    said = []
    found = sweep(
        str(given.model), given.text, None, tmp_path / "s", settings(components=("language",)), say=said.append
    )
    assert found["pictured"] == 0 and found["rows"][0]["kl"] > 0
    assert "1 held-out question, 0 with a picture; 1 part by component" in said
    assert "1 configuration on 1 held-out question (" in (tmp_path / "s/report.md").read_text()


def test_pictures_of_chats_that_are_too_long_do_not_count(given, tmp_path):
    processor = load_processor(given.model)
    chats = read_all(given.held_out)
    pictured, plain = (prepare(chat, processor)[0]["input_ids"].shape[1] for chat in chats)
    assert chats[0]["images"] and not chats[1]["images"] and plain < pictured
    message = f"no held-out chat with a picture has at most {plain} tokens, .*, raise --max-tokens, or study"
    with pytest.raises(QuantizeError, match=message):
        sweep(str(given.model), given.held_out, None, tmp_path / "study", settings(max_tokens=plain))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("images", "videos", "expected"), [(["a"], [], True), ([], ["b"], True), ([], [], False)])
def test_a_video_counts_as_a_picture(images, videos, expected):
    assert Question({"images": images, "videos": videos}, [], [], 0).pictured is expected
