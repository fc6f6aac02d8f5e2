"""The median of all ranks' saliencies, the effective number of tokens, and that weights which are cut keep enough."""

import threading

import pytest
import torch

from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.concentration import effective_tokens, pooled_median
from vlmq_vllm.offline.methods.saliency.vlmq import token_weights

ALONE = Ranks(torch.device("cpu"))


class Threads:
    """Two threads that add up as two ranks do."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2), {}

    def add(self, tensor):
        self.given[threading.get_ident()] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(sum(self.given.values()))
        self.barrier.wait()
        return tensor


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_median_is_torchs_of_the_positive_values(count):
    values = torch.randn(count).exp() * 1e-6
    pieces = [*values.split(3), torch.zeros(5)]
    assert pooled_median(pieces, ALONE) == values.median()


def test_median_of_nothing_is_zero():
    assert pooled_median([torch.zeros(4), torch.zeros(2)], ALONE) == 0


@pytest.mark.parametrize("function", [pooled_median, effective_tokens])
def test_ranks_find_what_one_process_does(function):
    values, found = torch.rand(41), []
    ranks = Threads()
    threads = [
        threading.Thread(target=lambda part=part: found.append(function([part], ranks)))
        for part in values.split([30, 11])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == pytest.approx([function([values], ALONE)] * 2, rel=1e-12)


def test_effective_tokens_by_hand():
    assert effective_tokens([torch.full((3,), 0.5), torch.full((4,), 0.5)], ALONE) == pytest.approx(7)
    assert effective_tokens([torch.tensor([0.0, 2.0]), torch.zeros(3)], ALONE) == pytest.approx(1)
    assert effective_tokens([torch.tensor([3.0, 1.0])], ALONE) == pytest.approx(16 / 10)
    assert effective_tokens([torch.zeros(3)], ALONE) == 0


@pytest.mark.parametrize("power", [1, 2])
def test_weights_that_are_cut_cannot_collapse(power):
    """Of each 100 tokens the first has ten thousand times the gradient: squared it is all there is, cut it is not."""
    g = torch.distributions.HalfCauchy(1.0).sample((2000,))
    g[::100] *= 1e4
    median = pooled_median([g], ALONE)
    free = token_weights([g], power, median)
    cut = token_weights([g], power, median, 0.0, 3.0)
    assert effective_tokens(free, ALONE) <= 40
    assert effective_tokens(cut, ALONE) >= len(g) / (2 * 3**power)
    least = g <= 3 * median
    torch.testing.assert_close(cut[0][least], free[0][least], rtol=0, atol=0)
    assert cut[0][~least].unique().numel() == 1
