"""The check that folding scales has left a layer's function alone: token by token, whatever else is in the stream."""

import math

import pytest
import torch

from scaled_blocks import Block, Scaled, scale, streams_of
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.methods.awq import search
from vlmq_vllm.offline.methods.awq.fold import PARITY, moved
from vlmq_vllm.offline.methods.awq.scalable import Scalable
from vlmq_vllm.offline.model.streams import Stream

EPS = 2**-23
SHAPES = [(7, 5), (2, 11, 75), (1, 99, 8), (3, 33, 16), (1, 100, 33), (2, 150, 9)]  # tokens up to 99, 100 and 300


def plain_moved(hidden, before, after):
    """By the definition, in double precision: the largest of all tokens but one in a hundred."""
    errors = []
    for h, b, a in zip(*(tensor.double().flatten(0, -2).tolist() for tensor in (hidden, before, after)), strict=True):
        excess = max(max(0, abs(y - x) - 8 * EPS * abs(x)) for x, y in zip(b, a, strict=True))
        errors.append(excess / max(abs(x - z) for z, x in zip(h, b, strict=True)))
    return sorted(errors)[len(errors) - 1 - len(errors) // 100]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moved_equals_the_definition(shape):
    """Tokens that are moved by differing shares, and one channel of 1e5 in the residual stream."""
    hidden, added = torch.randn(shape), torch.randn(shape)
    hidden[..., 0, 4] = 1e5
    before = hidden + added
    after = before + added * torch.rand(*shape[:-1], 1)
    # float32 differences of values around 1, where the channel of 1e5 is not the one that counts
    assert moved(hidden, before, after) == pytest.approx(plain_moved(hidden, before, after), rel=1e-4)


@pytest.mark.parametrize("strays", [0, 1, 2, 3])
def test_one_token_in_a_hundred_may_go_astray(strays):
    hidden, added = torch.randn(1, 250, 33), torch.randn(1, 250, 33)
    before = hidden + added
    after = before.clone()
    after[0, 17 : 17 + strays] += added[0, 17 : 17 + strays]
    assert (moved(hidden, before, after) > 0.9) == (strays > 2)


def test_rounding_of_the_residual_stream_is_not_counted():
    """What a layer adds to the channel of 1e5 is rounded to 2^-7; twice that is no reason for alarm, 1 is one."""
    hidden = torch.randn(2, 11, 75)
    hidden[0, 3, 4] = 1e5
    before = hidden + 0.1 * torch.randn(2, 11, 75)
    after = before.clone()
    after[0, 3, 4] += 2**-6
    assert not torch.equal(before, after) and moved(hidden, before, after) == 0
    after[0, 3, 4] += 1
    assert moved(hidden, before, after) > 1
    assert moved(hidden, hidden, hidden) == 0  # nothing added, nothing moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_moved_without_bound(bad):
    hidden, before = torch.randn(2, 200, 5), torch.randn(2, 200, 5)
    after = before.clone()
    after[1, 3, 2] = bad
    assert moved(hidden, before, after) == math.inf


def streams(sink: float) -> list[Stream]:
    """A batch with `sink` in one channel of one token."""
    (stream,) = streams_of((2, 11))
    stream.hidden[0, 3, 7] = sink
    return [stream]


@pytest.mark.parametrize("sink", [0.0, 1e5, 1e7])
def test_a_fold_that_moves_the_output_is_refused(sink, monkeypatch):
    """As if names were wrong about which channel is read where; at the mildest exponent that there is."""
    wrong = Scalable("mlp.up_proj", ("mlp.down_proj",), torch.arange(40).roll(1), None)
    monkeypatch.setattr(search, "find_scalable", lambda layer, stage, family: [wrong] if len(stage[0]) == 1 else [])
    monkeypatch.setattr(search, "RATIOS", (0.0, 0.05))
    monkeypatch.setattr(search, "candidate_losses", lambda *args: torch.tensor([[2.0, 1.0, 22.0]]))
    with pytest.raises(QuantizeError, match="scaling layer 0 moved its output .* please report it"):
        scale(Block(75, 40, Scaled(75, 0.0)), 0, streams(sink))


@pytest.mark.parametrize("sink", [0.0, 1e5, 1e7])
def test_a_fold_that_does_not_is_taken(sink):
    layer, given = Block(75, 40, Scaled(75, 0.0)), streams(sink)
    before = layer(given[0].hidden)
    assert max(scale(layer, 0, given).ratios.values()) > 0
    assert moved(given[0].hidden, before, layer(given[0].hidden)) < PARITY
