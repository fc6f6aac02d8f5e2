"""Fingerprints by content, and `vlmq data inspect`: its counts against numbers worked out by hand."""

import base64
import functools
import json

import pytest
from PIL import Image

from vlmq_vllm.offline.data.fingerprint import fingerprint, marks, shared
from vlmq_vllm.offline.data.inputs import load_processor, prepare
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.data.token_kinds import count_kinds, vision_ids


def url(path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def folder(tmp_path):
    """a.png, the same pixels as b.webp, one pixel changed in c.png, the same bytes in another shape in d.png."""
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.webp", lossless=True)
    changed = image.copy()
    changed.putpixel((59, 39), (0, 0, 1))
    changed.save(tmp_path / "c.png")
    Image.frombytes("RGB", (40, 60), image.tobytes()).save(tmp_path / "d.png")
    return tmp_path


def image(place) -> dict:
    return {"type": "image", "image": place}


def text(words) -> dict:
    return {"type": "text", "text": words}


def write(path, *samples):
    """A JSONL file of (content of the user, answer)."""
    turns = [[{"role": "user", "content": c}, {"role": "assistant", "content": a}] for c, a in samples]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    return path


@pytest.fixture
def read(folder):
    """The chat of a question with these parts, answered "x"."""
    return lambda *parts: read_all(write(folder / "one.jsonl", (list(parts), "x")))[0]


def test_the_same_content_has_the_same_fingerprint(folder, read):
    chat = read(image("a.png"), text("What is it?"))
    same = {
        "another format": read(image("b.webp"), text("What is it?")),
        "a data: URL": read({"type": "image_url", "image_url": {"url": url(folder / "a.png")}}, text("What is it?")),
        "text in pieces": read(image("a.png"), text("What "), text("is it?")),
    }
    spelled = '{"images": ["a.png"], "messages": [{"content": [{"type": "image"}, {"text": "What is it\\u003f", '
    spelled += '"type": "text"}], "role": "user"}, {"content": [{"text": "x", "type": "text"}], "role": "assistant"}]}'
    (folder / "other.jsonl").write_text(spelled)
    [same["another spelling"]] = read_all(folder / "other.jsonl")
    assert len(fingerprint(chat)) == 64
    assert {name: fingerprint(other) for name, other in same.items()} == dict.fromkeys(same, fingerprint(chat))
    pictures = [marks(other).pictures for other in same.values()]
    assert pictures == [marks(chat).pictures] * len(same)


def test_other_content_has_another_fingerprint(folder, read):
    (folder / "clip.avi").write_bytes(b"one")
    chats = [
        read(image("a.png"), text("q")),
        read(image("c.png"), text("q")),  # one pixel
        read(image("d.png"), text("q")),  # the same bytes, 40 x 60
        read(image("a.png"), text("p")),
        read(text("q"), image("a.png")),
        read(image("a.png"), image("a.png"), text("q")),
        read({"type": "video", "video": ["a.png"]}, text("q")),
        read({"type": "video", "video": ["a.png", "c.png"]}, text("q")),
        read({"type": "video", "video": "clip.avi"}, text("q")),
        read(text("q")),
    ]
    assert len({fingerprint(chat) for chat in chats}) == len(chats)
    a, c, d = (marks(chat).pictures[0] for chat in chats[:3])
    assert len({a, c, d}) == 3
    assert list(marks(chats[5]).pictures) == [a, a]
    assert list(marks(chats[7]).pictures) == [a, c]
    assert list(marks(chats[9]).pictures) == []


def test_roles_count(folder, read):
    chat = read(text("q"))
    turned = chat | {"messages": [message | {"role": "user"} for message in chat["messages"]]}
    assert fingerprint(turned) != fingerprint(chat)


def test_overlap(folder):
    samples = (
        ([image("a.png"), text("q")], "x"),
        ([image("a.png"), text("p")], "x"),
        ([image("c.png")], "x"),
        ("t", "x"),
    )
    calibration = read_all(write(folder / "calibration.jsonl", *samples))
    evaluation = read_all(write(folder / "evaluation.jsonl", ([image("b.webp"), text("q")], "x"), ("t", "x")))
    chats, pictures = shared([marks(chat) for chat in calibration], [marks(chat) for chat in evaluation])
    assert chats == [f"{folder}/calibration.jsonl line {n}" for n in (1, 4)]
    assert pictures == [f"{folder}/calibration.jsonl line {n}" for n in (1, 2)]


@pytest.fixture
def inspect(vlmq):
    """`vlmq data inspect ARGS`."""
    return functools.partial(vlmq, "data", "inspect")


@pytest.fixture
def mixed(folder):
    """Five chats with four pictures and a video of two frames."""
    Image.new("RGB", (168, 84)).save(folder / "wide.png")
    return write(
        folder / "mixed.jsonl",
        ([image("wide.png"), text("red")], "blue"),
        ([image("a.png"), image("d.png"), text("q")], "x"),
        ("only text", "x"),
        ([{"type": "video", "video": ["a.png", "c.png"]}], "x"),
        ([image("wide.png"), text("red")], "blue"),
    )


def test_counts(inspect, mixed):
    """Four pictures and frames have 2,400 pixels, one of them 40 wide and three 60; wide.png has 14,112."""
    code, out, errors = inspect(mixed, "--json")
    found = json.loads(out)
    assert code == 0 and errors == []
    twice = found["duplicates"]
    assert found | {"duplicates": None} == {
        "samples": 5,
        "text_only": 1,
        "pictures": 4,
        "videos": 1,
        "sizes": {"min": [40, 60], "median": [60, 40], "max": [168, 84]},
        "tasks": {},
        "duplicates": None,
    }
    assert len(twice["chats"]) == 1 and twice["chats"][0].rpartition(" ")[2] in ("1", "5")
    assert len(twice["pictures"]) == 2 and {line.rpartition(" ")[2] for line in twice["pictures"]} < {
        "1",
        "2",
        "4",
        "5",
    }


def test_tokens_by_kind(inspect, folder, demo_model):
    """168 x 84 is 6 x 3 tokens. Around the texts the template writes <|im_start|>user\\n, <|vision_start|>,
    <|vision_end|>, <|im_end|>\\n, <|im_start|>assistant\\n and <|im_end|>\\n.
    """
    Image.new("RGB", (168, 84)).save(folder / "wide.png")
    samples = [
        ([image("wide.png"), text("what colour is it?")], "red"),
        ([image("wide.png"), text("a b")], "blue door"),
    ]
    tokenizer = load_processor(demo_model).tokenizer
    count = lambda words: len(tokenizer(words)["input_ids"])  # noqa: E731
    user, answer = count("what colour is it?") + count("a b"), count("red") + count("blue door")
    around = sum(map(count, ("user\n", "\n", "assistant\n", "\n"))) + 2 + 2 + 2
    data = write(folder / "two.jsonl", *samples)
    found = json.loads(inspect(data, "--model", demo_model, "--json")[1])["tokens"]
    assert found["kinds"] == {"vision": 36, "user": user, "answer": answer, "special": 2 * around}
    lengths = sorted([18 + around + count(q[1]["text"]) + count(a) for q, a in samples])
    assert found["lengths"] == {"min": lengths[0], "median": lengths[0]} | dict.fromkeys(
        ("p90", "p99", "max"), lengths[1]
    )
    assert (found["used"], found["too_long"], found["shrunk"]) == (2, 0, 0)

    limits = ("--max-pixels", 84 * 42, "--max-tokens", lengths[1] - 13)  # 84 x 42 is 3 x 2 tokens, 12 fewer
    found = json.loads(inspect(data, "--model", demo_model, "--json", *limits)[1])["tokens"]
    assert found["lengths"]["max"] == lengths[1] - 12 and found["kinds"]["vision"] == 6
    assert (found["used"], found["too_long"], found["shrunk"]) == (1, 1, 1)

    found = json.loads(inspect(data, "--model", demo_model, "--json", "--max-tokens", 1)[1])["tokens"]
    assert (found["used"], found["too_long"]) == (0, 2) and found["kinds"] == dict.fromkeys(found["kinds"], 0)
    found = json.loads(inspect(data, "--model", demo_model, "--json", "--samples", 1)[1])["tokens"]
    assert found["used"] == 1 and found["kinds"]["vision"] == 18


def test_texts_that_the_template_also_writes(read, demo_model):
    """The user's "user" and "assistant" are the user's, and a template that strips texts is followed."""
    processor = load_processor(demo_model)
    config = json.loads((demo_model / "config.json").read_text())
    assert vision_ids(config) == {processor.image_token_id, processor.video_token_id}
    chat = read(text(" user assistant "))
    size = lambda words: len(processor.tokenizer(words)["input_ids"])  # noqa: E731

    def kinds():
        return count_kinds(chat, prepare(chat, processor)[0]["input_ids"][0].tolist(), processor, vision_ids(config))

    found = kinds()
    assert (found["user"], found["answer"], found["vision"]) == (size(" user assistant "), size("x"), 0)
    processor.chat_template = processor.chat_template.replace("{{ part.text }}", "{{ part.text | trim }}")
    assert kinds()["user"] == size("user assistant")
    processor.chat_template = processor.chat_template.replace("| trim", "| upper")
    assert kinds() == {"vision": 0, "user": None, "answer": None, "special": None}


def test_comparison_with_evaluation_data(inspect, mixed, folder):
    other = write(folder / "evaluation.jsonl", ("only text", "x"), ([image("d.png")], "x"))
    found = json.loads(inspect(mixed, "--against", other, "--json")[1])["overlap"]
    assert found == {"chats": [f"{mixed} line 3"], "pictures": [f"{mixed} line 2"]}


def test_table(inspect, mixed, folder, demo_model):
    code, out, errors = inspect(mixed, "--model", demo_model, "--against", mixed)
    rows = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    rows = {name: value.strip() for name, value in rows.items()}
    assert code == 0 and errors == []
    assert rows["samples"] == "5, 20% of them without a picture"
    assert rows["pictures, videos"] == "4, 1"
    assert rows["pixels"] == "min 40x60, median 60x40, max 168x84"
    assert rows["samples used"] == "5; 0 left out with more than 2048 tokens"
    assert rows["vision tokens"] == str(2 * 18 + 2 * 6 + 6)  # 60 x 40 is enlarged to 84 x 56, 2 x 3 tokens
    assert rows["also in the evaluation data"].startswith("5: line ") and rows["also in the evaluation data"].endswith(
        "..."
    )


def test_help(inspect):
    code, out, errors = inspect("--help")
    assert code == 0 and errors == [] and "hf:NAME" in out and "--against" in out


def bad_config(folder, model):
    copy = folder / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "token_id" not in k}))
    return copy


MISTAKES = {
    "no such file": (lambda d, f, m: ["none.jsonl"], 2, "cannot read calibration data none.jsonl"),
    "no picture": (lambda d, f, m: [write(f / "t.jsonl", ("q", "x"))], 2, "none of the 1 samples in"),
    "no such model": (lambda d, f, m: [d, "--model", f / "none"], 2, "is not a folder"),
    "model without vision tokens": (lambda d, f, m: [d, "--model", bad_config(f, m)], 2, "has neither image_token_id"),
    "no such evaluation data": (lambda d, f, m: [d, "--against", "none.jsonl"], 2, "cannot read calibration data none"),
    "no samples": (lambda d, f, m: [d, "--model", m, "--samples", 0], 2, "samples is 0; it must be at least 1"),
    "no pixels": (lambda d, f, m: [d, "--model", m, "--max-pixels", 0], 2, "max_pixels is 0; it must be at least 1"),
    "broken picture": (lambda d, f, m: [(f / "a.png").write_text("x") and d], 2, "cannot open the image"),
}


@pytest.mark.parametrize(("arguments", "exit_code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(arguments, exit_code, message, inspect, mixed, folder, demo_model):
    code, out, errors = inspect(*arguments(mixed, folder, demo_model))
    assert code == exit_code and out == ""
    assert len(errors) == 1 and errors[0].startswith("vlmq: error: ") and message in errors[0]
