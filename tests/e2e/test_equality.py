"""A quantised model and its dequantised twin answer alike through vLLM: eager, compiled, and after a reload.

Once with the trained demo model at 3 bits, once with a tiny random one that mixes every width in fused layers, vision
tower, merger and lm_head.
"""

from pathlib import Path

import pytest

import tiny_model
from answers import answers, difference
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.slow  # test_serving_families.py has the same of other random models

# Both folders stand for the same bfloat16 weights; what differs is the order of sums in the kernels, that is one
# rounding (2^-9) of logits of size about 5 for every layer.
TOLERANCE = 0.02
# Random weights leave tokens whose log-probabilities are closer than any tolerance; trained ones do not.
TIES = {"demo": 0.0, "tiny": 2 * TOLERANCE}


@pytest.fixture(scope="module", params=["demo", "tiny"])
def model(request, tmp_path_factory) -> tuple[Path, Path, float]:
    """A quantised folder, its twin in bfloat16, and what counts as a tie."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        quantized = request.getfixturevalue("quantized")
    else:
        quantized = root / "quantised"
        tiny_model.build(root / "source")
        tiny_model.quantize(root / "source", quantized)
    dequantize(quantized, root / "twin")
    return quantized, root / "twin", TIES[request.param]


def test_eager_and_reloaded_answers_equal_the_twins(model):
    quantized, twin, tie = model
    expected = answers(twin)
    found = answers(quantized, "reload")
    before, after = found[: len(expected)], found[len(expected) :]
    assert difference(before, expected, tie) < TOLERANCE
    assert difference(after, before) == 0


def test_compiled_answers_equal_the_twins(model):
    """The twin is compiled, too: where the compiler fuses, it rounds less often than the eager model does."""
    quantized, twin, tie = model
    assert difference(answers(quantized, "compiled"), answers(twin, "compiled"), tie) < TOLERANCE
