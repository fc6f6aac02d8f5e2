"""Rounding of tokens against its definition number by number, and what a layer loses by it against the bound."""

import pytest
import torch

from vlmq_vllm.activations import quantize_tokens, round_tokens

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of very different sizes, as after a norm's outlier channels."""
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.randint(-8, 8, (*shape[:-1], 1), generator=generator)
    return (torch.randn(*shape, generator=generator) * sizes).to(dtype)


def test_by_hand():
    x = torch.tensor([[0.0, 127.0, -63.5, 0.5, 1.5], [-2.54, 1.27, 0.0, 0.01, 0.02]])
    q, scale = quantize_tokens(x)
    assert q.tolist() == [[0, 127, -64, 0, 2], [-127, 64, 0, 0, 1]]  # halves to even; 1.27 / 0.02 is 63.5
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.02]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 5, 257)], ids=str)
def test_every_token_by_its_definition(shape, dtype):
    x = draw(*shape, dtype=dtype)
    q, scale = quantize_tokens(x)
    assert q.dtype == dtype and scale.dtype == torch.float32 and scale.shape == (*shape[:-1], 1)
    for row, integers, s in zip(x.flatten(0, -2), q.flatten(0, -2), scale.flatten(), strict=True):
        # Half a step, and room for ties (a half of the largest value): the step is rounded to float32, by 2^-24.
        steps = row.double() / s.double()
        assert ((steps - integers).abs() <= 0.5 + 127 * 2**-23).all()
        assert torch.equal(integers, integers.round()) and integers.abs().max() == 127


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_off_by_half_a_step(dtype):
    x = draw(7, 129, dtype=dtype)
    _, scale = quantize_tokens(x)
    rounded = round_tokens(x)
    assert rounded.dtype == dtype
    # Half a step, and the final rounding to dtype of numbers up to 127 steps.
    bound = scale * (0.5 + 127 * torch.finfo(dtype).eps)
    error = (rounded.double() - x.double()).abs()
    assert (error <= bound).all()
    assert (error > 0.4 * scale).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_on_the_grid_stays(dtype):
    q = torch.arange(-127, 128).to(dtype).repeat(2, 1)
    x = q * torch.tensor([[0.25], [4.0]], dtype=dtype)
    assert torch.equal(round_tokens(x), x)
    assert torch.equal(quantize_tokens(x)[0], q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_zeros_stay_zero_beside_others(dtype):
    x = draw(3, 16, dtype=dtype)
    x[1] = 0
    q, scale = quantize_tokens(x)
    assert torch.equal(q[1], torch.zeros(16, dtype=dtype)) and scale[1] == 0
    assert torch.equal(round_tokens(x)[[0, 2]], round_tokens(x[[0, 2]]))
    assert torch.equal(round_tokens(x)[1], torch.zeros(16, dtype=dtype))


def test_the_smallest_numbers_stay_within_the_range():
    """A step that float32 cannot hold exactly must not lead beyond 127."""
    for dtype in DTYPES:
        x = torch.tensor([[1.0, -3.0, 0.0]], dtype=dtype) * torch.finfo(dtype).smallest_normal
        q, _ = quantize_tokens(x)
        assert q.abs().max() <= 127 and q[0, 2] == 0


def test_no_tokens():
    q, scale = quantize_tokens(torch.empty(0, 8))
    assert q.shape == (0, 8) and scale.shape == (0, 1)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_vanish(bad):
    x = torch.ones(2, 4)
    x[0, 2] = bad
    rounded = round_tokens(x)
    assert rounded[0].isnan().any()
    assert torch.equal(rounded[1], x[1])
