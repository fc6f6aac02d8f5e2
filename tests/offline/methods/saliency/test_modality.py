"""Weights by modality, against gradients of transformers' own model by plain autograd."""

import statistics

import pytest
import torch
from transformers import AutoModelForImageTextToText

from family_samples import CPU, make_samples, streams_of
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.token_kinds import ANSWER, OTHER, VISION
from vlmq_vllm.offline.methods.saliency.modality import ModalityWeights, modality_ratios
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import linears_of

LAST = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "llava"])
def made(request, tmp_path_factory):
    source, _, samples = make_samples(request.param, tmp_path_factory.mktemp(request.param))
    return source, samples, streams_of(source, samples)


def parts(samples):
    return [sample.labels for sample in samples], [sample.kinds for sample in samples]


def expected_ratios(source, samples, modules):
    """Mean |gradient| over vision tokens by that over answer tokens, before the floor: one backward of the whole model
    for the mean over the answers of samples with a picture. {module: [ratio by layer]}
    """
    model = AutoModelForImageTextToText.from_pretrained(source.folder, dtype=torch.float32).eval()
    layers = model.get_submodule(source.family.layers)
    sums = {(module, i): [0.0, 0.0] for module in modules for i in range(len(layers))}
    counts = [0, 0]
    for sample in samples:
        seen = {}

        def keep(m, args, out, key, seen=seen):
            seen[key] = out[0] if isinstance(out, tuple) else out

        handles = [
            layers[i].get_submodule(module).register_forward_hook(lambda m, a, o, k=(module, i), f=keep: f(m, a, o, k))
            for module, i in sums
        ]
        with removing(handles):
            logits = model(**sample.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], sample.labels[0, 1:], reduction="sum")
        gradients = torch.autograd.grad(loss, list(seen.values()), materialize_grads=True)
        masks = [sample.kinds[0] == kind for kind in (VISION, ANSWER)]
        for j, mask in enumerate(masks):
            counts[j] += int(mask.sum())
            for key, gradient in zip(seen, gradients, strict=True):
                sums[key][j] += float(gradient[0].abs().mean(-1)[mask].sum())
    return {
        module: [sums[module, i][0] / counts[0] / (sums[module, i][1] / counts[1]) for i in range(len(layers))]
        for module in modules
    }


def test_ratios_equal_plain_autograd(made):
    """At o_proj and down_proj; samples without a picture have no part; no layer is below the median."""
    source, samples, streams = made
    assert [bool((sample.kinds == VISION).any()) for sample in samples] == [True, True, True, False]
    ratios = modality_ratios(source, streams, *parts(samples), CPU)
    assert ratios == modality_ratios(source, streams[:3], *parts(samples[:3]), CPU)
    raw = expected_ratios(source, samples[:3], LAST.values())
    assert len(ratios) == 3
    for part, module in LAST.items():
        middle = statistics.median(raw[module])
        assert raw[module][2] == 0 < middle  # nothing after the last layer's attention reads vision tokens
        found = [ratio[part] for ratio in ratios]
        # sums of |gradients| in another order, and the loss's other rounding
        assert found == pytest.approx([max(middle, ratio) for ratio in raw[module]], rel=1e-4)


def test_weights(made):
    source, samples, streams = made
    _, kinds = parts(samples)
    ratios = [{"attention": 0.25 + i, "mlp": 0.5 + i} for i in range(3)]
    weigh = ModalityWeights(source.family, ratios, kinds)
    layer = source.layers()[1]
    weights, notes = weigh(layer, 1, [], streams, None)
    assert notes == dict.fromkeys(linears_of(layer), "modality") and weights.keys() == notes.keys()
    attention, mlp = weights["self_attn.q_proj"], weights["mlp.gate_proj"]
    assert attention is not mlp
    for name, found in weights.items():
        assert found is (attention if name.startswith("self_attn.") else mlp)
    for own, kind in zip(attention, kinds, strict=True):
        by_kind = {VISION: 1.25, ANSWER: 1.0, OTHER: 0.0}
        assert own.dtype == torch.float32 and own.tolist() == [by_kind[k] for k in kind[0].tolist()]
    for own, kind in zip(mlp, kinds, strict=True):
        assert set(own[kind[0] == VISION].tolist()) <= {1.5} and (own[kind[0] == OTHER] == 0).all()


def test_a_mixture_is_judged_after_all_its_experts(tmp_path):
    source, _, samples = make_samples("qwen3_vl_moe", tmp_path)
    streams = streams_of(source, samples)
    ratios = modality_ratios(source, streams, *parts(samples), CPU)
    raw = expected_ratios(source, samples[:3], ["mlp"])["mlp"]
    middle = statistics.median(raw)
    assert [ratio["mlp"] for ratio in ratios] == pytest.approx([max(middle, r) for r in raw], rel=1e-4)
    layer = source.layers()[1]
    weights, notes = ModalityWeights(source.family, ratios, parts(samples)[1])(layer, 1, [], streams, None)
    assert weights.keys() == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert sorted(set(notes.values())) == ["equal", "modality"] and len(notes) == 4 + 18


def test_samples_of_one_kind_have_no_part(tmp_path):
    """Neither text alone nor a picture without an answer; with nothing else there are no ratios."""
    source, _, samples = make_samples("qwen2_vl", tmp_path)
    streams = streams_of(source, samples)
    labels, kinds = parts(samples)
    labels[1] = torch.full_like(labels[1], -100)
    found = modality_ratios(source, streams, labels, kinds, CPU)
    chosen = [0, 2]
    alone = [[of[i] for i in chosen] for of in (streams, labels, kinds)]
    assert found == modality_ratios(source, *alone, CPU)
    with pytest.raises(QuantizeError, match="no calibration sample has both a picture and an answer"):
        modality_ratios(source, [streams[i] for i in (1, 3)], labels[1::2], kinds[1::2], CPU)


def test_answers_without_a_gradient_are_refused(tmp_path):
    """An answer of one token with no mark after it: nothing that is predicted depends on its own place."""
    source, _, samples = make_samples("qwen2_vl", tmp_path)
    labels, kinds = samples[0].labels.clone(), samples[0].kinds.clone()
    later = (labels[0] != -100).nonzero().flatten()[1:]
    labels[0, later], kinds[0, later] = -100, OTHER
    with pytest.raises(QuantizeError, match="no finite gradient at answer tokens"):
        modality_ratios(source, streams_of(source, samples[:1]), [labels], [kinds], CPU)
