"""The answers' loss and its gradients, layer by layer, against autograd through the whole model; answer tokens."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from family_models import FAMILIES, VIDEO
from family_samples import CPU, make_samples, streams_of
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.inputs import prepare
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.data.token_kinds import (
    ANSWER,
    OTHER,
    VISION,
    answer_labels,
    count_kinds,
    count_labels,
    token_kinds,
    vision_ids,
)
from vlmq_vllm.offline.methods.saliency.answer_loss import backward
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.streams import Stream

NAMES = ("self_attn.o_proj", "mlp.down_proj", "self_attn")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name: (source, processor, samples) of a family's tiny model."""
    known = {}

    def make(name):
        if name not in known:
            known[name] = make_samples(name, tmp_path_factory.mktemp(name))
        return known[name]

    return make


def reference(source) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(source.folder, dtype=torch.float32).eval()


def whole(source, samples, streams):
    """Loss and gradients of transformers' own forward pass, sample by sample: at the decoder's input, which is that of
    the stream (Gemma scales its embeddings in the dtype of the table), and at the outputs of NAMES by (layer, name).
    """
    model = reference(source)
    total = sum(int((sample.labels[:, 1:] != -100).sum()) for sample in samples)
    loss, starts, inner = 0.0, [], []
    layers = model.get_submodule(source.family.layers)
    for sample, stream in zip(samples, streams, strict=True):
        start = stream.hidden.clone().requires_grad_()
        seen = {}
        handles = [layers[0].register_forward_pre_hook(lambda m, args, start=start: (start, *args[1:]))]
        for i, layer in enumerate(layers):
            for name in NAMES:

                def keep(m, args, out, key=(i, name), seen=seen):
                    seen[key] = out[0] if isinstance(out, tuple) else out

                handles.append(layer.get_submodule(name).register_forward_hook(keep))
        with removing(handles):
            logits = model(**sample.inputs).logits[0]
        wrong = torch.zeros(())
        for t in range(1, logits.shape[0]):
            if sample.labels[0, t] != -100:
                wrong = wrong - logits[t - 1].log_softmax(-1)[sample.labels[0, t]] / total
        found = torch.autograd.grad(wrong, [start, *seen.values()], materialize_grads=True)
        loss += wrong.item()
        starts.append(found[0])
        inner.append(dict(zip(seen, found[1:], strict=True)))
    return loss, starts, inner


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3"])
def test_equals_autograd_through_the_whole_model(name, made):
    """Tied heads, M-RoPE, DeepStack's terms after the first layers, sliding windows; float32 sums in another order."""
    source, _, samples = made(name)
    streams = streams_of(source, samples)
    before = [stream.hidden.clone() for stream in streams]
    inner = [{} for _ in samples]

    def visit(index, module, i, gradient):
        inner[i][index, module] = gradient

    loss, starts = backward(source, streams, [s.labels for s in samples], CPU, NAMES, visit)
    expected, starts_expected, inner_expected = whole(source, samples, streams)
    assert loss == pytest.approx(expected, rel=1e-5)
    for found, wanted, hidden in zip(starts, starts_expected, before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
        assert found.shape == hidden.shape
    for found, wanted in zip(inner, inner_expected, strict=True):
        assert found.keys() == wanted.keys() and len(found) == 3 * len(NAMES)
        for key, gradient in wanted.items():
            tolerance = 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(found[key], gradient.flatten(0, -2), rtol=1e-3, atol=tolerance)
    assert all(torch.equal(stream.hidden, hidden) for stream, hidden in zip(streams, before, strict=True))
    assert not any(stream.hidden.requires_grad for stream in streams)
    assert all(parameter.is_meta for layer in source.layers() for parameter in layer.parameters())
    if name == "qwen3_vl":
        assert streams[0].terms


def test_chunks_and_batches_change_nothing(made):
    """A limit of one byte makes a chunk of every stream; samples of one length in a batch have their own gradients."""
    source, _, samples = made("qwen3_vl")
    streams, labels = streams_of(source, samples), [s.labels for s in samples]
    loss, starts = backward(source, streams, labels, CPU)
    seen = []
    alone, each = backward(source, streams, labels, CPU, NAMES[:1], lambda *a: seen.append(a[:3]), limit=1)
    assert alone == pytest.approx(loss, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(starts, each, strict=True))
    assert seen == [(layer, NAMES[0], i) for i in range(len(streams)) for layer in (2, 1, 0)]

    twice = batched([samples[0].inputs, samples[0].inputs])
    [stream] = capture(source, source.family.layers, twice, CPU)
    other = torch.where(torch.arange(samples[0].labels.shape[1]) % 2 == 0, samples[0].labels, -100)
    both = torch.cat([samples[0].labels, other])
    _, [together] = backward(source, [stream], [both], CPU)
    total = count_labels([both])
    for i, own in enumerate((samples[0].labels, other)):
        _, [gradient] = backward(source, streams[:1], [own], CPU, total=total)
        # relative to the largest: a batch of two takes other kernels
        torch.testing.assert_close(together[i], gradient[0], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_streams_without_labels_are_left_out(made):
    source, _, samples = made("qwen2_vl")
    streams, labels = streams_of(source, samples[:2]), [samples[0].labels, torch.full_like(samples[1].labels, -100)]
    labels[1][0, 0] = 5  # nothing comes before it: it cannot be predicted
    seen = set()
    loss, starts = backward(source, streams, labels, CPU, NAMES, lambda layer, name, i, g: seen.add(i))
    assert seen == {0} and starts[0].any() and not starts[1].any()
    assert loss == backward(source, streams[:1], labels[:1], CPU)[0]
    with pytest.raises(QuantizeError, match="no calibration sample has an answer"):
        backward(source, streams[1:], labels[1:], CPU)


def test_soft_capped_logits(made):
    """final_logit_softcapping c: logits are c tanh(z / c)."""
    source, _, samples = made("gemma3")
    streams, labels = streams_of(source, samples[:1]), [samples[0].labels]
    text, model = source.model.config.get_text_config(), reference(source)
    first = model.get_submodule(source.family.layers)[0]
    start = first.register_forward_pre_hook(lambda m, args: (streams[0].hidden, *args[1:]))
    with torch.no_grad(), removing([start]):
        logits = model(**samples[0].inputs).logits[0, :-1]
    wanted = labels[0][0, 1:] != -100
    try:
        text.final_logit_softcapping = 0.5
        loss, _ = backward(source, streams, labels, CPU)
    finally:
        text.final_logit_softcapping = None
    capped = 0.5 * torch.tanh(logits[wanted] / 0.5)
    expected = torch.nn.functional.cross_entropy(capped, labels[0][0, 1:][wanted])
    assert loss == pytest.approx(float(expected), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits[wanted], labels[0][0, 1:][wanted])
    assert abs(float(plain) - loss) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_found_after_expanded_pictures(name, made):
    """Tokens of kind ANSWER spell the answers, each with the mark that ends its turn; vision tokens are the others."""
    source, processor, samples = made(name)
    vision = vision_ids(source.config)
    tokenizer = processor.tokenizer
    for sample in samples:
        ids, kinds = sample.inputs["input_ids"][0], sample.kinds[0]
        assert kinds.dtype == torch.int8 and kinds.shape == ids.shape
        assert set(kinds.tolist()) <= {OTHER, VISION, ANSWER}
        assert torch.equal(kinds == VISION, torch.isin(ids, torch.tensor(sorted(vision))))
        end = tokenizer.eos_token
        texts = [m["content"][0]["text"] for m in sample.chat["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(ids[kinds == ANSWER]).replace("\n", "") == "".join(text + end for text in texts)
        counts = count_kinds(sample.chat, ids.tolist(), processor, vision)
        assert counts["answer"] + len(texts) == int((kinds == ANSWER).sum())
        assert counts["vision"] == int((kinds == VISION).sum())
        assert torch.equal(sample.labels[0][kinds == ANSWER], ids[kinds == ANSWER])
        assert (sample.labels[0][kinds != ANSWER] == -100).all()


def test_the_same_words_elsewhere_are_no_answer(made):
    """The user says what the assistant says, before and after it."""
    source, processor, samples = made("qwen2_vl")
    said = {"type": "text", "text": "red"}
    roles = ("user", "assistant", "user", "assistant", "user")
    chat = samples[3].chat | {"messages": [{"role": role, "content": [said]} for role in roles]}
    ids = processor.tokenizer(processor.apply_chat_template(chat["messages"], tokenize=False))["input_ids"]
    kinds = token_kinds(chat, ids, processor, vision_ids(source.config)).tolist()
    word, end = processor.tokenizer("red")["input_ids"], processor.tokenizer.eos_token_id
    runs = [i for i in range(len(ids)) if ids[i : i + len(word)] == word]
    assert len(runs) == 5
    expected = [OTHER] * len(ids)
    for i in runs[1:4:2]:
        assert ids[i + len(word)] == end
        expected[i : i + len(word) + 1] = [ANSWER] * (len(word) + 1)
    assert kinds == expected


def test_a_token_that_only_ends_in_the_answer_belongs_to_it(made, monkeypatch):
    """ "ASSISTANT: red" is " red" to many tokenizers: it begins before the answer and is counted as the template's."""
    source, processor, samples = made("llava")
    tokenizer = processor.tokenizer
    template = "{% for m in messages %}{{ m.role }}:{% for p in m.content %} {{ p.text }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", template)
    chat = samples[3].chat | {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "is it"), ("assistant", "picture"))
        ]
    }
    ids = tokenizer("user: is itassistant: picture")["input_ids"]
    assert tokenizer.decode(ids[-1:]) == " picture"
    kinds = token_kinds(chat, ids, processor, vision_ids(source.config)).tolist()
    assert kinds == [OTHER] * (len(ids) - 1) + [ANSWER]
    assert count_kinds(chat, ids, processor, vision_ids(source.config))["answer"] == 0


def test_answers_that_cannot_be_told_are_refused(made):
    source, processor, samples = made("qwen2_vl")
    sample, vision = samples[0], vision_ids(source.config)
    ids = sample.inputs["input_ids"][0].tolist()
    last = int((sample.kinds[0] == ANSWER).nonzero()[0])
    with pytest.raises(QuantizeError, match=r"chats.jsonl line 1: .*writes them otherwise"):
        token_kinds(sample.chat, ids[:last] + ids[last + 1 :], processor, vision)
    before = processor.chat_template
    try:
        processor.chat_template = before.replace("{{ part.text }}", "{{ part.text | upper }}")
        with pytest.raises(QuantizeError, match=r"chats.jsonl line 1: .*rewrites texts"):
            token_kinds(sample.chat, ids, processor, vision)
    finally:
        processor.chat_template = before


def test_labels_are_ids_of_answers():
    ids, kinds = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[OTHER, VISION, ANSWER, ANSWER]], dtype=torch.int8)
    assert answer_labels(ids, kinds).tolist() == [[-100, -100, 6, 7]]
    assert count_labels([torch.tensor([[3, -100, 6], [-100, 1, 2]])]) == 3


def test_streams_keep_calls_and_terms(made):
    """A frozen copy of every field: what `backward` is given is what it leaves."""
    source, _, samples = made("qwen3_vl")
    [stream] = streams_of(source, samples[:1])
    fields = {field.name: getattr(stream, field.name) for field in dataclasses.fields(Stream)}
    backward(source, [stream], [samples[0].labels], CPU)
    assert all(getattr(stream, name) is value for name, value in fields.items())


@pytest.mark.parametrize("name", [name for name in VIDEO if name != "smolvlm"])  # it takes them in another shape
def test_answers_are_found_after_videos(name, made, tmp_path):
    """Some processors write the frames' times between their tokens; the user's words are the answer's too."""
    source, processor, _ = made(name)
    for i in range(4):
        Image.effect_noise((56, 56), 64).convert("RGB").save(tmp_path / f"{i}.png")
    video = {"type": "video", "video": [f"{i}.png" for i in range(4)]}
    asked = [{"type": "text", "text": "0.5 seconds"}, video, {"type": "text", "text": "0.5 seconds"}]
    chat = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "0.5 seconds"}]}
    (tmp_path / "video.jsonl").write_text(json.dumps(chat))
    [chat] = read_all(tmp_path / "video.jsonl")
    ids = prepare(chat, processor)[0]["input_ids"][0]
    kinds = token_kinds(chat, ids.tolist(), processor, vision_ids(source.config))
    places = (kinds == ANSWER).nonzero().flatten().tolist()
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(ids[kinds == ANSWER]).replace("\n", "") == f"0.5 seconds{end}"
    assert places == list(range(places[0], places[0] + len(places)))  # one run, after everything else
    assert places[0] > int((kinds == VISION).nonzero().max())
