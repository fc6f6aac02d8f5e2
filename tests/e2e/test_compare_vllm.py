"""`vlmq compare --backend vllm` on the demo model: real engines, a process each, beside the figures of transformers."""

import numpy as np
import pytest

from vlmq_vllm.offline.compare import engine, hf
from vlmq_vllm.offline.compare.questions import Exam, end_ids, read_question
from vlmq_vllm.offline.compare.report import sample_row
from vlmq_vllm.offline.data.inputs import load_processor
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.settings.compare import CompareSettings

pytest.importorskip("vllm", reason="vLLM is not installed")

# The model's largest logits lie between 16 and 32, where bfloat16 has steps of 2^-3. Other orders of sums make a logit
# fall on the next step in one back end, and a log-probability is a logit less (mostly) the largest one.
LOGARITHM = 0.125
COUNT = 7


@pytest.mark.slow
def test_figures_agree_with_those_of_transformers(demo_model, quantized, tmp_path):
    from data import write

    chats = read_all(write(tmp_path, "evaluation", COUNT))
    processor = load_processor(demo_model)
    ends = end_ids(demo_model, processor)
    questions = [read_question(chat, processor, ends) for chat in chats]
    scores = {}
    for backend, score in (("hf", hf.score), ("vllm", engine.score)):
        settings = CompareSettings(backend=backend, device="cpu" if backend == "hf" else "", max_new_tokens=8)
        exam = Exam(questions, processor, ends, settings)
        teacher = score(demo_model, exam, None, lambda items, what: items)
        scores[backend] = teacher, score(quantized, exam, teacher, lambda items, what: items)
    for model in (0, 1):
        for ours, theirs in zip(scores["hf"][model], scores["vllm"][model], strict=True):
            np.testing.assert_array_equal(ours.answer, theirs.answer)
            np.testing.assert_allclose(theirs.own, ours.own, atol=LOGARITHM)
            np.testing.assert_array_equal(theirs.best, ours.best)
            np.testing.assert_array_equal(theirs.greedy, ours.greedy)
            assert worst(ours, theirs) < LOGARITHM
    rows = {name: [sample_row(*each) for each in zip(questions, *pair, strict=True)] for name, pair in scores.items()}
    kl = {name: np.mean([row["kl"] for row in found]) for name, found in rows.items()}
    # log-probabilities that are off by d change a divergence by about d^2 / 2
    assert kl["vllm"] == pytest.approx(kl["hf"], abs=LOGARITHM**2 / 2)
    assert kl["vllm"] > 0


def worst(ours, theirs) -> float:
    """The largest difference of log-probabilities at ids that both kept, of tokens likelier than e^-7."""
    differences = []
    for ids, logs, other_ids, other_logs in zip(ours.ids, ours.logs, theirs.ids, theirs.logs, strict=True):
        other = dict(zip(other_ids.tolist(), other_logs.tolist(), strict=True))
        likely = {token: log for token, log in zip(ids.tolist(), logs.tolist(), strict=True) if log > -7}
        differences += [abs(log - other[token]) for token, log in likely.items()]
    assert len(differences) >= len(ours.answer)
    return max(differences)
