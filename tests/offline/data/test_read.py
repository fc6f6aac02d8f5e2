"""Where calibration chats come from: folders, data sets, other spellings of JSONL; one line for every mistake."""

import importlib
import json
import sys

import pytest
from PIL import Image

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data import hub
from vlmq_vllm.offline.data.pictures import open_image
from vlmq_vllm.offline.data.read import read_all, read_chats

RED, BLUE = (200, 30, 30), (10, 20, 250)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one in a subfolder."""
    (tmp_path / "more").mkdir()
    Image.new("RGB", (60, 40), RED).save(tmp_path / "a.png")
    Image.new("RGB", (30, 50), BLUE).save(tmp_path / "more/b.webp", lossless=True)
    return tmp_path


def lines(path, *entries):
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def said(chat) -> list:
    """[(role, kinds of parts and texts)] of a chat."""
    return [(m["role"], [part.get("text", part["type"]) for part in m["content"]]) for m in chat["messages"]]


def colours(chat) -> list:
    return [open_image(place).getpixel((0, 0)) for place in chat["images"]]


def test_folder_with_captions_beside_the_pictures(folder):
    (folder / "a.txt").write_text("A red field.\n")
    (folder / "more/b.txt").write_text("\ufeffA blue door.", encoding="utf-8")
    (folder / "README.txt").write_text("not a caption")
    first, second = read_all(folder)
    assert said(first) == [("user", ["image", "Describe the image."]), ("assistant", ["A red field."])]
    assert said(second) == [("user", ["image", "Describe the image."]), ("assistant", ["A blue door."])]
    assert colours(first) == [RED] and colours(second) == [BLUE] and first["videos"] == []


def test_folder_with_metadata(folder):
    lines(
        folder / "metadata.jsonl",
        {"file_name": "more/b.webp", "caption": "A door."},
        {"file_name": "a.png", "text": "red", "question": "Which colour?"},
    )
    first, second = read_all(str(folder))
    assert said(first) == [("user", ["image", "Describe the image."]), ("assistant", ["A door."])]
    assert said(second) == [("user", ["image", "Which colour?"]), ("assistant", ["red"])]
    assert colours(first) == [BLUE] and colours(second) == [RED]
    assert second["line"].endswith("metadata.jsonl line 2")


def asked(*content) -> list[dict]:
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


ENTRIES = {
    "LLaVA": (
        {
            "conversations": [{"from": "human", "value": "<image>\nand?"}, {"from": "gpt", "value": "x"}],
            "image": "a.png",
        },
        [("user", ["image", "and?"]), ("assistant", ["x"])],
    ),
    "placeholders in strings": (
        {"messages": asked("one <image> two <image>"), "images": ["a.png", "a.png"]},
        [("user", ["one ", "image", " two ", "image"])],
    ),
    "pictures without any part": (
        {"messages": [{"role": "system", "content": "s"}, *asked("both?")], "images": ["a.png", "a.png"]},
        [("system", ["s"]), ("user", ["image", "image", "both?"])],
    ),
    "placeholder that stands for nothing": ({"messages": asked("<image>")}, [("user", ["<image>"])]),
    "frames": (
        {"messages": asked({"type": "video", "video": ["a.png", "a.png"]})},
        [("user", ["video"])],
    ),
    "bare video": ({"messages": asked({"type": "video"}), "videos": [["a.png"]]}, [("user", ["video"])]),
}


@pytest.mark.parametrize(("entry", "expected"), ENTRIES.values(), ids=ENTRIES)
def test_spellings_of_a_chat(entry, expected, folder):
    [chat] = read_all(lines(folder / "chats.jsonl", entry))
    assert said(chat) == expected
    parts = [kind for _, kinds in expected for kind in kinds]
    assert len(chat["images"]) == parts.count("image") and len(chat["videos"]) == parts.count("video")
    assert "task" not in chat


def test_frames_and_task_are_kept(folder):
    entry = {"messages": asked({"type": "video", "video": ["a.png", "more/b.webp"]}), "task": "watch"}
    [chat] = read_chats(lines(folder / "chats.jsonl", entry), seed=0)
    assert chat["videos"] == [[folder / "a.png", folder / "more/b.webp"]] and chat["task"] == "watch"


def test_pictures_are_opened_as_a_server_does(tmp_path):
    """Upright by the EXIF tag (6: turn right by 90 degrees), transparent pixels on white."""
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("RGB", (60, 40), RED).save(tmp_path / "turned.png", exif=tag)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "turned.png").size == (40, 60)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def caption_missing(folder):
    (folder / "a.txt").write_text("red")
    return folder


def no_pictures(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def metadata(*entries):
    return lambda folder: lines(folder / "metadata.jsonl", *entries).parent


def chats(*entries):
    return lambda folder: lines(folder / "chats.jsonl", *entries)


MISTAKES = {
    "picture without a caption": (caption_missing, r"b.webp has no caption; write it to b.txt"),
    "no pictures": (no_pictures, "has no metadata.jsonl and no pictures"),
    "metadata without a caption": (metadata({"file_name": "a.png"}), "line 1 describes no picture .*'caption'"),
    "metadata with an empty caption": (metadata({"file_name": "a.png", "text": " "}), "caption or answer is empty"),
    "metadata of another picture": (metadata({"file_name": "c.png", "text": "x"}), "names the image c.png, no such"),
    "metadata that is no JSON object": (metadata([1]), "line 1 describes no picture"),
    "more pictures than parts": (
        chats({"messages": asked({"type": "image"}), "images": ["a.png", "a.png"]}),
        "line 1 is no chat .*1 more images are listed than its messages use",
    ),
    "fewer videos than parts": (chats({"messages": asked({"type": "video"})}), "fewer videos are given"),
    "video that is not there": (chats({"messages": asked({"type": "video", "video": "v.mp4"})}), "names the video v.m"),
    "video as data": (chats({"messages": asked({"type": "video", "video": "data:x"})}), "holds a video as data: URL"),
    "video from the network": (
        chats({"messages": asked({"type": "video", "video": "https://a/b"})}),
        "videos are not fetched",
    ),
    "frame that is not there": (chats({"messages": asked({"type": "video", "video": ["c.png"]})}), "the image c.png"),
    "name that no file can have": (chats({"messages": asked({"type": "image", "image": "x" * 300})}), "no such file"),
    "text that is none": (chats({"messages": asked({"type": "text", "text": None})}), "the text None is no string"),
    "unknown speaker": (chats({"conversations": [{"from": "cat", "value": "miaow"}]}), "line 1 is no chat .*'cat'"),
    "pictures without a user": (
        chats({"messages": [{"role": "assistant", "content": "x"}], "images": ["a.png"]}),
        "images are listed but there is no user message",
    ),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(make, message, folder):
    with pytest.raises(QuantizeError, match=message) as caught:
        read_all(make(folder))
    assert "\n" not in str(caught.value)


NAMES = {
    "hf:owner/name": ("owner/name", None, "train"),
    "hf:owner/name/config@test": ("owner/name", "config", "test"),
    "hf:name@train[:5]": ("name", None, "train[:5]"),
    "hf:/a/b@c/d": ("/a/b@c/d", None, "train"),
    "hf:./set@validation": ("set", None, "validation"),
}


@pytest.mark.parametrize(("source", "expected"), NAMES.items(), ids=NAMES)
def test_names_of_data_sets(source, expected):
    assert hub.parse(source) == expected


@pytest.mark.parametrize("source", ["hf:", "hf:a/b/c/d", "hf:a//b", "hf:a@"])
def test_bad_names_of_data_sets(source):
    with pytest.raises(QuantizeError, match="names no data set; write hf:OWNER/NAME"):
        hub.parse(source)


COLUMNS = {
    "chats": (["id", "messages", "images"], (["messages"], "images")),
    "LLaVA": (["conversations", "image", "task"], (["conversations", "task"], "image")),
    "questions": (["text", "image", "question", "answer"], (["question", "answer"], "image")),
    "captions": (["image", "caption"], (["caption"], "image")),
}


@pytest.mark.parametrize(("names", "expected"), COLUMNS.values(), ids=COLUMNS)
def test_columns_are_found_by_their_names(names, expected):
    assert hub.columns("hf:x", names) == expected


def test_columns_of_another_shape_are_named():
    with pytest.raises(QuantizeError, match="hf:x has the columns image, label; shapes that are understood: messages"):
        hub.columns("hf:x", ["image", "label"])


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import raises ImportError, as without the package
    with pytest.raises(QuantizeError, match=r"pip install 'vlmq-vllm\[data\]'"):
        read_chats("hf:owner/name", seed=0)


@pytest.fixture
def parquet(folder, monkeypatch):
    """Write columns as a data set's only file; gives its source."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setattr(importlib.import_module("datasets.config"), "HF_DATASETS_CACHE", folder / "cache")

    def write(as_names=False, **columns):
        (folder / "set").mkdir()
        data = datasets.Dataset.from_dict(columns)
        kinds = {} if as_names else {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
        for name in kinds.keys() & columns.keys():
            data = data.cast_column(name, kinds[name])
        data.to_parquet(folder / "set/train.parquet")
        return f"hf:{folder / 'set'}"

    return write


def test_data_set_of_questions(folder, parquet):
    pictures = [str(folder / "a.png"), str(folder / "more/b.webp")]
    first, second = read_all(parquet(image=pictures, question=["q0", "q1"], answer=["a0", "a1"]))
    assert said(first) == [("user", ["image", "q0"]), ("assistant", ["a0"])]
    assert said(second) == [("user", ["image", "q1"]), ("assistant", ["a1"])]
    assert colours(first) == [RED] and colours(second) == [BLUE]
    assert second["line"].endswith("set row 1")
    [only] = read_all(f"hf:{folder / 'set'}@train[1:]")
    assert said(only) == said(second) and colours(only) == [BLUE]


def test_data_set_of_chats(folder, parquet):
    red, blue = str(folder / "a.png"), str(folder / "more/b.webp")
    turns = [{"from": "human", "value": "<image>\n<image>\nq"}, {"from": "gpt", "value": "a"}]
    plain = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    first, second = read_all(parquet(images=[[blue, red], []], conversations=[turns, plain]))
    assert said(first) == [("user", ["image", "image", "q"]), ("assistant", ["a"])]
    assert colours(first) == [BLUE, RED] and second["images"] == []


def test_data_set_that_is_not_there(folder, parquet):
    with pytest.raises(QuantizeError, match="cannot load the data set .*/none") as caught:
        read_all(f"hf:{folder}/none")
    assert "\n" not in str(caught.value)
    source = parquet(image=[str(folder / "a.png")], label=["x"])
    with pytest.raises(QuantizeError, match="has the columns image, label"):
        read_all(source)
    with pytest.raises(QuantizeError, match="Unknown split"):
        read_all(f"{source}@validation")


def test_pictures_that_a_data_set_only_names(folder, parquet):
    source = parquet(as_names=True, conversations=[[{"from": "human", "value": "q"}]], image=["0001.jpg"])
    with pytest.raises(QuantizeError, match="row 0 holds the image '0001.jpg'; the data set itself must hold"):
        read_all(source)
