"""Metrics and their intervals are those of the textbooks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deploy_prune.tasks.quality import Quality, bootstrap, f1, matthews, perplexity, share, spearman


def test_share_has_the_wilson_interval() -> None:
    hits = np.array([1.0] * 84 + [0.0] * 16)
    value, interval = share(hits)
    expected = stats.binomtest(84, 100).proportion_ci(method="wilson")
    assert value == 0.84
    assert interval == pytest.approx((expected.low, expected.high))


def test_spearman_equals_scipy_with_ties() -> None:
    generator = np.random.default_rng(0)
    rows = np.stack([generator.normal(size=50), generator.integers(0, 4, 50)], axis=1)
    assert spearman(rows) == pytest.approx(stats.spearmanr(rows[:, 0], rows[:, 1]).statistic)


@pytest.mark.parametrize("classes", [2, 4])
def test_matthews_and_f1_equal_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, 200)
    answers = np.where(generator.random(200) < 0.6, labels, generator.integers(0, classes, 200))
    rows = np.stack([answers, labels], axis=1).astype(float)
    assert matthews(rows) == pytest.approx(metrics.matthews_corrcoef(labels, answers))
    if classes == 2:
        assert f1(rows) == pytest.approx(metrics.f1_score(labels, answers))


def test_answers_of_one_class_correlate_with_nothing() -> None:
    rows = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert matthews(rows) == f1(rows) == 0.0


def test_perplexity_weighs_tokens_not_windows() -> None:
    rows = np.array([[2.0, 1.0], [0.0, 3.0]])
    assert perplexity(rows) == pytest.approx(np.exp(0.5))


def test_bootstrap_is_repeatable_and_holds_the_value() -> None:
    rows = np.random.default_rng(1).normal(size=(200, 1))
    first = bootstrap(rows, lambda r: float(r.mean()))
    assert first == bootstrap(rows, lambda r: float(r.mean()))
    assert first[1][0] < first[0] < first[1][1]


def test_drop_counts_in_the_direction_that_hurts() -> None:
    top1 = [Quality("top1", v, 10, (0, 1), True) for v in (0.8, 0.7)]
    ppl = [Quality("perplexity", v, 10, (0, 9), False) for v in (5.0, 6.0)]
    assert top1[1].drop_from(top1[0]) == pytest.approx(0.1)
    assert ppl[1].drop_from(ppl[0]) == 1.0


def test_json_leaves_out_values_per_example() -> None:
    quality = Quality("top1", 0.5, 2, (0.1, 0.9), True, np.array([0.0, 1.0]))
    assert quality.to_json() == {
        "metric": "top1",
        "value": 0.5,
        "n": 2,
        "interval": [0.1, 0.9],
        "higher_is_better": True,
    }
