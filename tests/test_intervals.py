"""Intervals against scipy, slow references and simulated studies with known truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from lymphfeat.evaluation.intervals import (
    bootstrap_auc_gain,
    bootstrap_metrics,
    corrected_factor,
    estimate,
    holm,
    t_half_width,
)
from lymphfeat.evaluation.metrics import METRICS, all_metrics


def test_t_interval_is_scipys() -> None:
    values = np.array([0.7, 0.8, 0.75, 0.9])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert t_half_width(values) == pytest.approx((high - low) / 2)
    # Nadeau–Bengio widens it: 1/n + n_test/n_train in place of 1/n
    factor = 1 / 4 + 0.25
    assert t_half_width(values, factor) == pytest.approx((high - low) / 2 * np.sqrt(factor * 4))


def test_estimate_is_a_t_test_when_training_sets_do_not_overlap() -> None:
    values = np.array([0.02, -0.01, 0.05, 0.03, 0.0])
    found = estimate(values, 0.0)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_overlap_widens_an_estimate_and_raises_its_p() -> None:
    values = np.array([0.02, -0.01, 0.05, 0.03, 0.0])
    plain, corrected = estimate(values, 0.0), estimate(values, 0.25)
    assert corrected.half_width == pytest.approx(plain.half_width * (1 + 0.25 * 5) ** 0.5)
    assert corrected.p > plain.p
    assert corrected_factor(5, 0.25) == pytest.approx(0.45)


def test_equal_differences_are_no_evidence_when_nil_and_certain_otherwise() -> None:
    assert estimate(np.zeros(5), 0.25).p == 1
    assert estimate(np.full(5, 0.1), 0.25).p == 0
    assert np.isnan(estimate(np.array([0.1]), 0.25).p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).map(np.array))
def test_holm_rejects_what_its_stepwise_definition_rejects(p: np.ndarray) -> None:
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for place, i in enumerate(np.argsort(p, kind="stable")):
            if p[i] * (len(p) - place) > level:
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(holm(p) <= level).tolist()) == rejected


def test_holm_leaves_out_what_is_unknown() -> None:
    assert holm(np.array([0.01, np.nan, 0.04])) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)


def cohort(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and the probabilities of a fixed model of true BA .766 (at .5) and AUC .846."""
    labels = (np.arange(patients) % 3 > 0).astype(int)
    scores = rng.normal(np.where(labels == 1, 0.725, -0.725), 1)
    return 1 / (1 + np.exp(-scores)), labels


def test_bootstrap_covers_the_truth_of_a_fixed_model() -> None:
    """At least 92 % of 200 studies of 42 patients (issue: a 95 % interval)."""
    rng = np.random.default_rng(0)
    truth = {"ba": stats.norm.cdf(0.725), "auc": stats.norm.cdf(0.725 * 2**0.5)}
    covered = dict.fromkeys(truth, 0)
    for study in range(200):
        intervals = bootstrap_metrics(*cohort(rng, 42), 0.5, draws=400, seed=study)
        for name, value in truth.items():
            covered[name] += intervals[name][0] <= value <= intervals[name][1]
    assert min(covered.values()) >= 0.92 * 200, covered


def test_bootstrap_holds_the_estimate_and_narrows_with_patients() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for patients in (60, 600):
        probabilities, labels = cohort(rng, patients)
        intervals = bootstrap_metrics(probabilities, labels, 0.5)
        found = all_metrics(probabilities, labels)
        for name in METRICS:
            assert intervals[name][0] <= found[name] <= intervals[name][1], name
        widths.append(intervals["ba"][1] - intervals["ba"][0])
    assert widths[1] < 0.45 * widths[0]


def test_bootstrap_of_a_faultless_model_still_has_width() -> None:
    labels = np.array([0] * 10 + [1] * 20)
    intervals = bootstrap_metrics(labels * 0.8 + 0.1, labels, 0.5)
    assert intervals["ba"][0] < 0.97
    assert intervals["auc"][0] == pytest.approx(0.025**0.1)


def test_bootstrap_of_one_class_is_unknown() -> None:
    intervals = bootstrap_metrics(np.array([0.2, 0.8]), np.array([1, 1]), 0.5)
    assert np.isnan(intervals["ba"]).all()


@pytest.mark.seconds
def test_auc_gain_against_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], [25, 40])
    one = labels + rng.normal(0, 1.0, 65)
    other = labels + rng.normal(0, 2.0, 65)
    gain, low, high = bootstrap_auc_gain(one, other, labels)
    assert gain == pytest.approx(roc_auc_score(labels, one) - roc_auc_score(labels, other))
    gains = []
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(25, 25), 25 + rng.choice(40, 40)])
        gains.append(
            roc_auc_score(labels[drawn], one[drawn]) - roc_auc_score(labels[drawn], other[drawn])
        )
    assert [low, high] == pytest.approx(np.quantile(gains, [0.025, 0.975]), abs=0.03)
    assert bootstrap_auc_gain(one, one, labels) == (0, 0, 0)
    assert all(np.isnan(bootstrap_auc_gain(one[:25], one[:25], labels[:25])))


def test_bootstrap_with_thresholds_of_each_fold() -> None:
    """Shifting a fold's probabilities and threshold alike changes nothing but the pooled AUC."""
    rng = np.random.default_rng(5)
    labels, folds = np.array([0, 1, 1] * 20), np.arange(60) // 20
    probabilities = rng.random(60) + 0.3 * labels
    plain = bootstrap_metrics(probabilities, labels, 0.6, folds, draws=300)
    shifted = bootstrap_metrics(probabilities + folds, labels, 0.6 + folds, folds, draws=300)
    for name in ("ba", "sensitivity", "specificity", "auc"):
        assert shifted[name] == pytest.approx(plain[name]), name
    one_fold = bootstrap_metrics(probabilities, labels, 0.6, 0 * folds, draws=300)
    for name, interval in bootstrap_metrics(probabilities, labels, 0.6, draws=300).items():
        assert one_fold[name] == pytest.approx(interval)
    others = rng.random(60)
    gain = bootstrap_auc_gain(probabilities + folds, others - folds, labels, folds)
    assert gain == pytest.approx(bootstrap_auc_gain(probabilities, others, labels, folds))
