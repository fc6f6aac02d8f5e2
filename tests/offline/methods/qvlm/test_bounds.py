"""The vision encoder's bounds: the decoder's part of the gradient against autograd of the whole, and learning."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from benchmarks.qvlm_fake.clipped_inputs import clip_rows
from benchmarks.qvlm_fake.fake import fake, row_ranges
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.data.batches import batched
from vlmq_vllm.offline.data.inputs import load_processor, model_inputs
from vlmq_vllm.offline.data.read import read_chats
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.gptq.solve import round_to_nearest
from vlmq_vllm.offline.methods.qvlm.bounds import Clipped, Hyperparameters, clip_groups, clipping, learn_bounds
from vlmq_vllm.offline.methods.qvlm.decoder import effect_of, states, widened
from vlmq_vllm.offline.methods.qvlm.entropy import conditional_entropy, joint_table
from vlmq_vllm.offline.methods.qvlm.ranges import find_ranges
from vlmq_vllm.offline.methods.qvlm.tower import learn_tower
from vlmq_vllm.offline.methods.saliency import answer_loss
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import hidden_of

CPU = torch.device("cpu")
FORMAT = WeightFormat(3, -1, False)


@pytest.fixture(scope="module")
def source(demo_model):
    return Source(demo_model)


@pytest.fixture(scope="module")
def data(demo_model, calibration):
    """Batches of at most two chats and their labels: the answer and its end mark."""
    chats = read_chats(calibration, 0)
    samples = [inputs for _, inputs in model_inputs(chats, load_processor(demo_model), 4, 2048)]
    batches = batched(samples, 130)
    labels = [torch.full_like(batch["input_ids"], -100) for batch in batches]
    for batch, label in zip(batches, labels, strict=True):
        label[:, -3:-1] = batch["input_ids"][:, -3:-1]  # a newline follows, which the model has not learnt
    return batches, labels


def names(source) -> list[str]:
    return [f"{source.family.blocks}.{i}" for i in range(4)]


def test_gradients_through_streamed_layers_are_those_of_the_whole(source, data):
    (stream, *_) = capture(source, source.family.layers, data[0][:1], CPU)
    full = states(source, stream, CPU)
    ranges = widened([], full)
    moved = replace(stream, hidden=stream.hidden + 0.05 * torch.randn_like(stream.hidden))
    found = effect_of(source, moved, full[-1], ranges, 4, CPU)

    layers = [source.materialise(f"{source.family.layers}.{i}", CPU) for i in range(4)]
    places = [moved.hidden.clone().requires_grad_()]
    for i, layer in enumerate(layers):
        places.append(replace(stream, hidden=places[-1]).run(layer, i))
    error = (places[-1] - full[-1]).norm() / full[-1].norm()
    by_error = torch.autograd.grad(error, places[:-1], retain_graph=True)
    norms = torch.stack([gradient.norm() for gradient in by_error])
    entropy = sum(
        share * conditional_entropy(joint_table(*(x.flatten(0, 1) for x in places[k : k + 2]), *ranges[k : k + 2], 16))
        for k, share in enumerate(norms / norms.sum())
    )
    (by_entropy,) = torch.autograd.grad(entropy, places[0])
    for i in range(4):
        source.release(f"{source.family.layers}.{i}")
    assert found.error == pytest.approx(error.item(), rel=1e-5) and found.error > 0
    assert found.entropy == pytest.approx(entropy.item(), rel=1e-5)
    # float32 through four layers in the same order; the sums of the two ways back differ in theirs
    torch.testing.assert_close(found.error_gradient, by_error[0], rtol=1e-3, atol=1e-5 * float(by_error[0].abs().max()))
    torch.testing.assert_close(found.entropy_gradient, by_entropy, rtol=1e-3, atol=1e-4 * float(by_entropy.abs().max()))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "group"), [((5, 64), 32), ((3, 100), 32), ((7, 33), -1)])
def test_a_learnt_factor_rounds_as_what_is_written(symmetric, shape, group):
    weight, format = torch.randn(shape), WeightFormat(3, group, symmetric)
    ranges = find_ranges(weight, format, torch.bfloat16)
    own = clip_groups(weight, ranges)
    with torch.no_grad():
        own.factors[0].uniform_(0.5, 1.2)
    expected = ranges.rounded(weight, own.factors[0].detach())
    found = own.weight()
    torch.testing.assert_close(found, expected.dequantize())
    # one weight of a group at a time: cut ones move with their end of the range, the others by what rounding adds
    (gradient,) = torch.autograd.grad(found[0, 1], own.factors[0])
    zero = float(format.middle if ranges.zero is None else ranges.zero[0, 0])
    first = float(ranges.scale[0, 0])
    place = float(weight[0, 1]) / float(expected.scale[0, 0]) + zero
    moves = float(expected.codes[0, 1]) - (zero if not 0 <= place <= 7 else place)
    assert float(gradient[0, 0]) == pytest.approx(first * moves, rel=1e-3, abs=1e-5)
    assert int(gradient.count_nonzero()) <= 1


def clipped_tower(source, rows: int = 0) -> dict[str, Clipped]:
    """All blocks' linears; those of the last `rows` blocks with inputs rounded as well."""
    clipped = {}
    for i, name in enumerate(names(source)):
        block = source.materialise(name, CPU)
        for linear, weight in weights_of(block).items():
            weight = weight.detach()
            if i < 4 - rows:
                clipped[f"{name}.{linear}"] = clip_groups(weight, find_ranges(weight, FORMAT, torch.bfloat16))
            else:
                clipped[f"{name}.{linear}"] = clip_rows(weight, row_ranges(weight, 16), 4, 0.99)
        source.release(name)
    return clipped


def whole(source, batch: dict, clipped: dict[str, Clipped]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x^0 to x^n and the logits of the model's own forward pass, all of it in memory and in one graph."""
    family, places = source.family, []
    parts = [f"{family.layers}.{i}" for i in range(4)] + [f"{family.layers.rpartition('.')[0]}.norm", "lm_head"]
    modules = [source.materialise(name, CPU) for name in parts]
    handles = [modules[0].register_forward_pre_hook(lambda m, args: places.append(args[0]))]
    handles += [
        layer.register_forward_hook(lambda m, args, out: places.append(hidden_of(out))) for layer in modules[:4]
    ]
    with source.before_decoder(CPU), clipping(source.model, clipped), torch.enable_grad(), removing(handles):
        logits = source.model(**batch, use_cache=False).logits
    for name in parts:
        source.release(name)
    return places, logits


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def test_the_gradient_of_a_batch_is_that_of_the_whole_objective(source, data):
    """Autograd of the weighted sum of all four terms, through the model's own forward pass."""
    (batch, *_), (label, *_) = data
    label = label.where(label < 0, 7)  # answers the model does not expect: else L_reg has next to no gradient
    with torch.no_grad():
        full, _ = whole(source, batch, {})
    clipped = clipped_tower(source, rows=1)
    factors = [factor for own in clipped.values() for factor in own.factors]
    places, logits = whole(source, batch, clipped)
    encoder, decoder = ((places[k] - full[k]).norm() / full[k].norm() for k in (0, -1))
    by_error = torch.autograd.grad(decoder, places[:-1], retain_graph=True)
    norms = torch.stack([gradient.norm() for gradient in by_error])
    ranges = widened([], full)
    entropy = sum(
        share * conditional_entropy(joint_table(*(x.flatten(0, 1) for x in places[k : k + 2]), *ranges[k : k + 2], 16))
        for k, share in enumerate(norms / norms.sum())
    )
    answer = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), label[:, 1:].flatten(), ignore_index=-100)
    terms = {"answer": answer, "entropy": 3.0 * entropy, "encoder": 0.7 * encoder, "decoder": 0.7 * 1.9 * decoder}
    parts = {name: torch.autograd.grad(term, factors, retain_graph=True) for name, term in terms.items()}
    expected = [sum(own) for own in zip(*parts.values(), strict=True)]
    for own in parts.values():  # each is far more than the tolerance below
        assert norm(own) > 0.1 * norm(expected)

    (loss,) = learn_bounds(
        source, [batch], [label], clipped, CPU, Hyperparameters(entropy=3.0, error=0.7, eta=1.9, epochs=1)
    )
    found = [loss.total, loss.answer, loss.entropy, loss.encoder, loss.decoder]
    wanted = [value.item() for value in (sum(terms.values()), answer, entropy, encoder, decoder)]
    assert found == pytest.approx(wanted, rel=1e-4)
    for factor, gradient in zip(factors, expected, strict=True):
        # float32 on both sides, sums in another order: 3e-6 were seen
        assert norm([factor.grad - gradient]) < 1e-4 * norm([gradient])


def test_learning_lowers_the_loss_and_its_terms(source, data, monkeypatch):
    clipped, read, materialise = clipped_tower(source), [], source.materialise

    def counted(name: str, *args, **options) -> torch.nn.Module:
        read.append(name)
        return materialise(name, *args, **options)

    monkeypatch.setattr(source, "materialise", counted)
    losses = learn_bounds(source, *data, clipped, CPU, Hyperparameters(epochs=4, rate=0.01))
    # what the docstring says of the cost
    assert all(read.count(f"{source.family.layers}.{i}") == (5 * 4 + 1) * len(data[0]) for i in range(4))
    assert len(losses) == 4 and losses[-1].total < 0.95 * losses[0].total
    assert losses[-1].encoder < losses[0].encoder and losses[-1].decoder < losses[0].decoder
    assert all((own.factors[0] - 1).abs().max().item() > 0.01 for own in clipped.values())


def test_the_answers_gradient_is_what_the_given_function_says(source, data, monkeypatch):
    """With nothing but L_reg, a gradient of zero moves nothing; the streams handed over are those in front of the
    decoder, and cut off from the encoder."""
    weight = source.parameter(f"{names(source)[0]}.mlp.fc1.weight").float()
    seen = []

    def backward(source, streams, labels, device):
        seen.append((streams[0].hidden.shape[:2], labels[0].shape, streams[0].hidden.requires_grad))
        return 0.25, [torch.zeros_like(streams[0].hidden)]

    monkeypatch.setattr(answer_loss, "backward", backward)
    own = clip_groups(weight, find_ranges(weight, FORMAT, torch.bfloat16))
    hyper = Hyperparameters(entropy=0.0, error=0.0, epochs=2)
    losses = learn_bounds(source, *data, {f"{names(source)[0]}.mlp.fc1": own}, CPU, hyper)
    assert torch.equal(own.factors[0], torch.ones_like(own.factors[0]))
    assert [loss.total for loss in losses] == [0.25, 0.25]
    assert seen == 2 * [(label.shape, label.shape, False) for label in data[1]]


def test_bounds_of_weights_and_tokens_learn_together(source, data):
    clipped = {}
    for name in names(source)[:2]:
        block = source.materialise(name, CPU)
        for linear, weight in weights_of(block).items():
            clipped[f"{name}.{linear}"] = own = clip_rows(weight.detach(), row_ranges(weight, 16), 4, 1.0)
            torch.testing.assert_close(own.weight(), fake(weight, *row_ranges(weight, 16), 16))
        source.release(name)
    losses = learn_bounds(source, *data, clipped, CPU, Hyperparameters(epochs=3, rate=0.01))
    assert losses[-1].total < losses[0].total
    assert all((factor != 1).all() for own in clipped.values() for factor in own.factors[1:])


def test_a_batch_without_a_picture_teaches_nothing(source, data):
    """Nor does one without an answer: both are passed over, and refused where nothing else is left."""
    batches, labels = data
    blank = {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}
    silent = [torch.full_like(label, -100) for label in labels]
    for untaught in (([blank], [torch.zeros(1, 3)]), (batches, silent)):
        with pytest.raises(QuantizeError, match="both a picture and an answer"):
            learn_bounds(source, *untaught, {}, CPU, Hyperparameters())
    own = {"a": Clipped([torch.ones(1).requires_grad_()], torch.empty)}
    assert (
        learn_bounds(source, [blank, batches[0]], [torch.zeros(1, 3), labels[0]], own, CPU, Hyperparameters(epochs=0))
        == []
    )


def test_a_tower_is_rounded_as_was_learnt(source, data):
    given = source, names(source), lambda name: FORMAT, CPU, Ranks(CPU), *data
    first, again = (learn_tower(*given, hyper=Hyperparameters(epochs=1)) for _ in range(2))
    for name in names(source):
        block = source.materialise(name, CPU)
        for linear, weight in weights_of(block).items():
            found, other = (rounded(f"{name}.{linear}", weight) for rounded in (first, again))
            assert torch.equal(found.codes, other.codes) and torch.equal(found.scale, other.scale)
            plain = round_to_nearest(weight, FORMAT, torch.bfloat16).scale
            assert not torch.equal(found.scale, plain)
            # a rate of 0.005 and two batches move a factor by about 0.01 at most; bfloat16 adds 2^-8
            torch.testing.assert_close(found.scale, plain, rtol=0.02, atol=0)
        source.release(name)
