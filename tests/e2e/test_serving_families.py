"""Every family that can be quantised, served by vLLM: the quantised model and its dequantised twin answer alike.

Weights are random, so the models are compared in float16, whose roundings are eight times finer than bfloat16's, and by
the log-probabilities of all tokens of the prompts, pictures included, beside greedy answers.
"""

from pathlib import Path

import pytest

import engines
import served_models
from family_models import FAMILIES
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

pytest.importorskip("vllm", reason="vLLM is not installed")

# Both folders stand for the same weights; kernels add up in another order, and the twin's weights are rounded to
# float16 (2^-11 relative, in each of about 20 products). Logits are about 5. Seen: 0.006 in float16.
TOLERANCE = 0.02
BFLOAT16 = ("gemma3",)  # vLLM refuses to serve it in float16


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Quantised folder and twin of every family that a test is run for."""
    root = tmp_path_factory.mktemp("families")
    names = engines.asked_for(request, "family")
    for name in names:
        _, quantized = served_models.build(name, root / name)
        dequantize(quantized, root / name / "twin")
    return {name: (root / name / "quantised", root / name / "twin") for name in names}


def answers(folders: dict[str, tuple[Path, Path]], **options) -> dict[str, tuple[list, list]]:
    """By family what the quantised model and its twin say."""
    jobs = []
    for name, pair in folders.items():
        dtype = "bfloat16" if name in BFLOAT16 else "float16"
        jobs += [engines.Job(str(folder), options | {"dtype": dtype}) for folder in pair]
    found = engines.run(jobs, timeout=1800)
    return {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(folders)}


@pytest.fixture(scope="module")
def eager(folders):
    return answers(folders)


@pytest.fixture(scope="module")
def compiled(folders):
    return answers(folders, enforce_eager=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_answers_equal_the_twins(eager, family):
    assert engines.difference(*eager[family]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_answers_equal_the_twins(compiled, family):
    assert engines.difference(*compiled[family]) < TOLERANCE
