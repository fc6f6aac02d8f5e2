"""Which tokens of a chat are its reference answer, on the demo model's chat template and processor."""

import pytest

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.compare.questions import end_ids, read_question
from vlmq_vllm.offline.data.inputs import load_processor


@pytest.fixture(scope="module")
def processor(demo_model):
    return load_processor(demo_model)


@pytest.fixture(scope="module")
def ends(demo_model, processor):
    return end_ids(demo_model, processor)


def chat(*turns: tuple[str, str], images=()) -> dict:
    """A chat of (role, text) turns; every "#" in a text stands for a picture."""
    messages = []
    for role, text in turns:
        parts = [{"type": "image"}] * text.count("#") + [{"type": "text", "text": text.replace("#", "")}]
        messages.append({"role": role, "content": parts})
    return {"messages": messages, "images": list(images), "videos": [], "line": "chats.jsonl line 7"}


def test_end_mark_belongs_to_the_answer_and_the_line_break_after_it_does_not(processor, ends):
    question = read_question(chat(("user", "What colour?"), ("assistant", "red")), processor, ends)
    decode = processor.tokenizer.decode
    assert decode(question.words) == "<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(question.answer) == "red<|im_end|>" and question.trailing == 1
    inputs, start = question.inputs(processor)
    ids = inputs["input_ids"][0].tolist()
    assert ids[:start] == question.words and ids[start : start + len(question.answer)] == question.answer


def test_last_assistant_message_is_the_answer(processor, ends, calibration):
    picture = calibration.parent / "00000.png"
    turns = (
        ("user", "#Is it red?"),
        ("assistant", "yes"),
        ("user", "And blue?"),
        ("assistant", "no"),
        ("user", "#Why?"),
    )
    question = read_question(chat(*turns, images=[picture, "unused"]), processor, ends)
    assert processor.tokenizer.decode(question.answer) == "no<|im_end|>"
    assert question.chat["images"] == [picture]
    inputs, start = question.inputs(processor)
    placeholders = inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert placeholders.sum() == 36 and start == len(question.words) + 35


def test_splits(processor, ends, calibration):
    turns = (("user", "#What colour?"), ("assistant", "red"))
    pictured = chat(*turns, images=[calibration.parent / "00000.png"]) | {"task": "colours"}
    assert read_question(pictured, processor, ends).splits == ["with picture", "task colours"]
    assert read_question(chat(("user", "Hi"), turns[1]), processor, ends).splits == ["text only"]


MISTAKES = {
    "no answer": (chat(("user", "Hi")), "has no question with an assistant message after it"),
    "no question": (chat(("assistant", "Hi")), "has no question with an assistant message after it"),
    "empty answer": (chat(("user", "Hi"), ("assistant", " ")), "its reference answer is empty"),
    "end mark": (chat(("user", "Hi"), ("assistant", "a<|im_end|>b")), "goes on after an end-of-turn mark"),
}


@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=MISTAKES)
def test_chats_without_a_usable_answer_are_named(wrong, message, processor, ends):
    with pytest.raises(QuantizeError, match="^chats.jsonl line 7.*") as error:
        read_question(wrong, processor, ends)
    assert message in str(error.value)


def test_a_template_that_writes_another_prompt_is_refused(processor, ends, monkeypatch):
    """As templates of reasoning models do: the prompt ends in a mark that an answered chat does not have."""
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.rstrip()[:-11] + "<think>{%- endif -%}")
    rendered = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert "<think>" in str(rendered)
    with pytest.raises(QuantizeError, match="does not begin the answered chat with the prompt"):
        read_question(chat(("user", "Hi"), ("assistant", "red")), processor, ends)
