"""Reading calibration chats: the accepted shapes, and one clear line for everything else."""

import base64
import io
import json

import pytest
from PIL import Image
from transformers import AutoProcessor

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.inputs import model_inputs
from vlmq_vllm.offline.data.pictures import open_image
from vlmq_vllm.offline.data.read import read_chats

PIXELS = Image.new("RGB", (168, 168), (200, 30, 30))


def png() -> bytes:
    buffer = io.BytesIO()
    PIXELS.save(buffer, "PNG")
    return buffer.getvalue()


def user(*parts) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "red"}]}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "a.png").write_bytes(png())

    def write(*entries):
        path = tmp_path / "chats.jsonl"
        path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
        return path

    return write


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
TEXT = {"type": "text", "text": "What colour?"}
SHAPES = {
    "path": user({"type": "image", "image": "a.png"}, TEXT),
    "OpenAI": user({"type": "image_url", "image_url": {"url": URL}}, TEXT),
    "images beside messages": user({"type": "image"}, TEXT) | {"images": ["a.png"]},
}


@pytest.mark.parametrize("chat", SHAPES.values(), ids=SHAPES)
def test_every_accepted_shape_gives_the_same_inputs(chat, write, demo_model):
    processor = AutoProcessor.from_pretrained(demo_model)
    [chat] = read_chats(write(chat), seed=0)
    [(_, inputs)] = model_inputs([chat], processor, 1, 100)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count("<|image_pad|>") == 36
    assert text.startswith("<|im_start|>user\n<|vision_start|>")
    assert text.endswith("<|vision_end|>What colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n")
    assert inputs["pixel_values"].shape == (144, 3 * 2 * 14 * 14)


def test_training_batches_are_what_the_processor_makes(demo_model):
    """The demo's training script cuts pictures and builds positions by itself; both must be the processor's."""
    import torch

    from batches import batch
    from pictures import Picture, ask

    processor = AutoProcessor.from_pretrained(demo_model)
    image, question = ask("evaluation", 3)
    parts = [{"type": "image"}, {"type": "text", "text": question.text}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": question.answer}]
    inputs = processor(text=[processor.apply_chat_template(chat)], images=[image], return_tensors="pt")
    own = batch([Picture(image, [question])], processor.tokenizer, 1)
    length = own["ids"].shape[1]  # the template ends every turn in a newline, the batch in <|im_end|>
    assert torch.equal(inputs["input_ids"][:, :length], own["ids"])
    torch.testing.assert_close(inputs["pixel_values"], own["pixels"], rtol=0, atol=1e-5)


def test_seed_decides_the_order(write):
    path = write(*[user({"type": "image", "image": "a.png"}, {"type": "text", "text": str(i)}) for i in range(20)])
    orders = [[c["messages"][0]["content"][1]["text"] for c in read_chats(path, seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_long_samples_are_left_out_whole(write, demo_model):
    processor = AutoProcessor.from_pretrained(demo_model)
    image = {"type": "image", "image": "a.png"}
    chats = read_chats(write(user(image, TEXT), user(image, {"type": "text", "text": "word " * 300})), seed=0)
    kept = list(model_inputs(chats, processor, 10, 100))
    assert len(kept) == 1 and (kept[0][1]["input_ids"] == processor.image_token_id).sum() == 36
    with pytest.raises(
        QuantizeError, match="none of the 0 samples drawn, of at most 20 tokens, has a picture; raise --max-tokens"
    ):
        list(model_inputs(chats, processor, 10, 20))


def test_samples_with_images_must_remain(write, demo_model):
    """The file has an image, but the only chat that is short enough has none."""
    processor = AutoProcessor.from_pretrained(demo_model)
    picture = user({"type": "image", "image": "a.png"}, {"type": "text", "text": "word " * 300})
    chats = read_chats(write(picture, user(TEXT)), seed=0)
    with pytest.raises(
        QuantizeError, match="none of the 1 samples drawn, of at most 100 tokens, has a picture; raise --max-tokens"
    ):
        list(model_inputs(chats, processor, 10, 100))


@pytest.mark.parametrize("text", ["<|image_pad|>", "a <|video_pad|> b", "<|im_end|>"])
def test_special_tokens_in_texts_are_refused(text, write, demo_model):
    processor = AutoProcessor.from_pretrained(demo_model)
    path = write(user({"type": "image", "image": "a.png"}, {"type": "text", "text": text}))
    with pytest.raises(QuantizeError, match=r"chats.jsonl line 1: the text .* holds <\|"):
        list(model_inputs(read_chats(path, seed=0), processor, 10, 100))


def test_pictures_that_the_processor_refuses_are_named(write, tmp_path, demo_model):
    """Qwen2-VL's processor takes no picture more than 200 times as wide as high."""
    Image.new("RGB", (4000, 10)).save(tmp_path / "strip.png")
    processor = AutoProcessor.from_pretrained(demo_model)
    path = write(user({"type": "image", "image": "strip.png"}, TEXT))
    with pytest.raises(QuantizeError, match="chats.jsonl line 1: the model's processor refuses it .*aspect ratio"):
        list(model_inputs(read_chats(path, seed=0), processor, 10, 100))


def test_any_line_of_json_is_one_chat(write):
    """U+2028 ends a line for Python's splitlines, not for JSON; editors put a byte order mark in front."""
    path = write(user({"type": "image", "image": "a.png"}, {"type": "text", "text": "one\u2028line"}))
    path.write_text("\ufeff" + json.dumps(json.loads(path.read_text()), ensure_ascii=False), encoding="utf-8")
    [chat] = read_chats(path, seed=0)
    assert chat["messages"][0]["content"][1]["text"] == "one\u2028line"


BAD = {
    "no images": ([{"messages": [{"role": "user", "content": "hi"}]}], "none of the 1 samples in .* has an image"),
    "empty file": ([], "none of the 0 samples"),
    "not JSON": ([user({"type": "image", "image": "a.png"}), "{"], "line 2 is no chat"),
    "no messages": ([{"text": "hi"}], "line 1 is no chat"),
    "unknown part": ([user({"type": "audio"})], "unknown part type 'audio'"),
    "no such image": ([user({"type": "image", "image": "b.png"})], "names the image b.png, no such file"),
    "address": ([user({"type": "image", "image": "https://a/b.png"})], "pictures are not fetched, download it first"),
    "image of nonsense": ([user({"type": "image", "image": 7})], "line 1 is no chat"),
    "too few images": ([user({"type": "image"})], "line 1 is no chat"),
}


@pytest.mark.parametrize(("entries", "message"), BAD.values(), ids=BAD)
def test_bad_files(entries, message, write):
    with pytest.raises(QuantizeError, match=message):
        read_chats(write(*entries), seed=0)


def test_missing_file(tmp_path):
    with pytest.raises(QuantizeError, match="cannot read calibration data"):
        read_chats(tmp_path / "none.jsonl", seed=0)


@pytest.mark.parametrize("place", ["data:image/png;base64,AAAA", "data:image/png;base64,%%%"])
def test_broken_images(place):
    with pytest.raises(QuantizeError, match="cannot open the image"):
        open_image(place)
