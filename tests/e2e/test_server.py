"""The demo model at 3 bits behind a real `vllm serve`, asked about held-out pictures through the openai client."""

import pytest

from pictures import ask

pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture(scope="module")
def client(quantized, tmp_path_factory):
    from server import serve

    with serve(quantized, "--quantization", "vlmq", log=tmp_path_factory.mktemp("server") / "log") as client:
        yield client
    with pytest.raises(Exception, match="[Cc]onnection"):  # the server is gone
        client.models.list()


def test_answers_are_those_of_the_same_weights_in_transformers(client, quantized, tmp_path):
    """Two kernels may choose differently where two tokens are equally likely, so one answer in ten may differ."""
    from demo import answers_of
    from server import ask_all
    from vlmq_vllm.offline.checkpoint.dequantize import dequantize

    asked = [ask("evaluation", i) for i in range(28)]
    pairs = [(image, question.text) for image, question in asked]
    served = ask_all(client, pairs)
    dequantize(quantized, tmp_path / "twin")
    expected = answers_of(tmp_path / "twin", pairs)
    assert sum(a == b for a, b in zip(served, expected, strict=True)) >= 26
    assert sum(q.answer == answer for (_, q), answer in zip(asked, served, strict=True)) >= 20


def test_a_question_without_a_picture(client, quantized):
    """The chat template leaves no place for a picture, and the request is served to its end."""
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "What colour is the star?"}]
    reply = client.chat.completions.create(model="demo", messages=chat, temperature=0, max_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nWhat colour is the star?<|im_end|>\n<|im_start|>assistant\n"
    assert reply.usage.prompt_tokens == len(tokenizer.encode(prompt))
    assert reply.choices[0].finish_reason == "stop"
