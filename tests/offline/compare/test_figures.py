"""The arithmetic of `vlmq compare` without any model: divergence, first difference, files of scores, bootstrap."""

import numpy as np
import pytest

from vlmq_vllm.offline.compare.bootstrap import intervals
from vlmq_vllm.offline.compare.report import split_rows
from vlmq_vllm.offline.compare.scores import Score, first_difference, kl, load, save

TOKENS, VOCABULARY = 5, 40


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of two models that are somewhat alike, [TOKENS, VOCABULARY] float64."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((TOKENS, VOCABULARY))
    return tuple(_log_softmax(x) for x in (logits, logits + 0.5 * rng.standard_normal(logits.shape)))


def _log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def score(logs: np.ndarray, ids: np.ndarray, greedy=()) -> Score:
    """What is kept of log-probabilities [T, V] at ids [T, k]."""
    mask = np.zeros(logs.shape, bool)
    np.put_along_axis(mask, ids, True, axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.where(mask, 0.0, np.exp(logs)).sum(1))
    kept = np.take_along_axis(logs, ids, axis=1)
    best = logs.argmax(1).astype(np.int32)
    return Score(
        answer=best,
        ids=ids.astype(np.int32),
        logs=kept.astype(np.float32),
        rest=rest.astype(np.float32),
        own=kept[:, 0].astype(np.float32),
        best=best,
        greedy=np.array(greedy, dtype=np.int32),
    )


def likeliest(logs: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logs, axis=1)[:, :k]


def test_kl_grows_with_the_outcomes_up_to_that_over_the_vocabulary(pair):
    p, q = pair
    full = (np.exp(p) * (p - q)).sum(1)
    last = np.zeros(TOKENS)
    for k in (1, 2, 5, 20, VOCABULARY):
        ids = likeliest(p, k)
        found = kl(score(p, ids), score(q, ids))
        # float32 keeps log-probabilities of size 10 to 2^-21, about 5e-7
        assert (found >= last - 1e-6).all() and (found <= full + 1e-6).all()
        last = found
    np.testing.assert_allclose(last, full, atol=1e-6)
    assert full.min() > 0.01  # so that the comparison above says something


def test_kl_of_a_model_with_itself_is_exactly_zero(pair):
    same = score(pair[0], likeliest(pair[0], 7))
    assert (kl(same, same) == 0).all()


def test_kl_of_two_outcomes_by_hand():
    """0.9 against 0.6 on the first token; the two others are one outcome."""
    p, q = np.log([[0.9, 0.06, 0.04]]), np.log([[0.6, 0.1, 0.3]])
    ids = np.array([[0]])
    expected = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    np.testing.assert_allclose(kl(score(p, ids), score(q, ids)), expected, rtol=1e-6)  # float32


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 5, 3], 1), ([4], [1, 2], 0), ([1, 2], [1, 2, 3], 2), ([], [], None)],
)
def test_first_difference(one, other, expected):
    assert first_difference(np.array(one, dtype=np.int32), np.array(other, dtype=np.int32)) == expected


def test_scores_come_back_from_a_file_as_they_were(pair, tmp_path):
    scores = [score(pair[0], likeliest(pair[0], 3), [1, 2]), None, score(pair[1][:2], likeliest(pair[1], 3)[:2])]
    save(tmp_path / "scores", scores, {"a": "b"})
    back = load(tmp_path / "scores")
    assert back[1] is None and len(back) == 3
    for before, after in zip((scores[0], scores[2]), (back[0], back[2]), strict=True):
        for name, array in vars(before).items():
            np.testing.assert_array_equal(getattr(after, name), array)
            assert getattr(after, name).dtype == array.dtype


def test_interval_of_a_normal_sample_is_that_of_theory():
    """1.96 standard errors to each side; 4000 draws leave the bounds uncertain by about 3 % of that."""
    values = np.random.default_rng(1).normal(5, 2, (400, 1))
    mean, low, high = intervals(values, seed=0)[:, 0]
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)


def test_interval_holds_the_true_mean_as_often_as_it_says():
    """Of 200 intervals for 60 coin throws about 95 % hold the coin's mean; four standard errors are 6.2 %."""
    throws = np.random.default_rng(2).random((60, 200)) < 0.7
    _, low, high = intervals(throws.astype(float), seed=0)
    share = ((low <= 0.7) & (high >= 0.7)).mean()
    assert 0.888 <= share < 1.0


def test_columns_are_resampled_together_and_repeatably():
    """A constant difference of two scattered columns has an interval without width."""
    first = np.random.default_rng(3).normal(size=50)
    values = np.stack([first, first + 1, np.ones(50)], axis=1)
    found = intervals(values, seed=4)
    np.testing.assert_allclose(found[1:, 1] - found[1:, 0], 1.0)
    np.testing.assert_allclose(found[:, 2], 1.0)
    assert found[2, 0] - found[1, 0] > 0.3
    np.testing.assert_array_equal(found, intervals(values, seed=4))
    assert (found != intervals(values, seed=5)).any()


def test_samples_without_a_value_do_not_count():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan], [2.0, np.nan]])
    found = intervals(values, seed=0)
    assert found[0, 0] == 2 and 1 <= found[1, 0] < 2 < found[2, 0] <= 3
    assert np.isnan(found[:, 1]).all()
    assert np.isnan(intervals(values[:1], seed=0)[1:]).all()  # one sample has no spread


def test_parts_of_the_data():
    """By picture and by task; a part that is everything is not repeated."""
    figures = dict.fromkeys(("top1", "nll_teacher", "nll_student", "nll_difference"), 0.0)
    figures |= dict.fromkeys(("exact_teacher", "exact_student", "exact_difference"), 0.0)
    figures |= {"greedy_same": 1.0, "first_difference": None, "tokens": 2}
    kinds = (["with picture", "task b"], ["text only", "task b"], ["with picture", "task a"])
    rows = [{**figures, "kl": float(i), "splits": splits} for i, splits in enumerate(kinds)]
    found = {row["split"]: row for row in split_rows(rows, seed=0)}
    assert list(found) == ["all", "text only", "with picture", "task a", "task b"]
    assert [row["n"] for row in found.values()] == [3, 1, 2, 1, 2]
    assert [row["kl"]["mean"] for row in found.values()] == [1.0, 1.0, 1.0, 2.0, 0.5]
    assert found["all"]["first_difference"] is None and found["all"]["tokens"] == 6
    assert [row["split"] for row in split_rows(rows[:1], seed=0)] == ["all"]
