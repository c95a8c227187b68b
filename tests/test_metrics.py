"""Metrics against scikit-learn and slow references."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from lymphfeat.evaluation.metrics import (
    EVERYONE,
    all_metrics,
    balanced_accuracy,
    choose_threshold,
    fold_auc,
    oracle_balanced_accuracy,
    roc_auc,
)

LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
PROBABILITIES = st.lists(
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5001, 0.75, 1.0]), min_size=9, max_size=9
).map(np.array)


@pytest.mark.seconds
@given(PROBABILITIES)
def test_metrics_are_those_of_scikit_learn(probabilities: np.ndarray) -> None:
    ours = all_metrics(probabilities, LABELS)
    called = probabilities > 0.5
    assert ours["ba"] == pytest.approx(sk.balanced_accuracy_score(LABELS, called))
    assert ours["sensitivity"] == pytest.approx(sk.recall_score(LABELS, called))
    assert ours["specificity"] == pytest.approx(sk.recall_score(LABELS, called, pos_label=0))
    assert ours["auc"] == pytest.approx(sk.roc_auc_score(LABELS, probabilities))
    assert ours["brier"] == pytest.approx(sk.brier_score_loss(LABELS, probabilities))
    kept = np.clip(probabilities, 1e-7, 1 - 1e-7)
    assert ours["log_loss"] == pytest.approx(sk.log_loss(LABELS, kept))


def test_many_heads_at_once_are_each_one() -> None:
    rng = np.random.default_rng(0)
    stacked = rng.random((3, 4, 9)).round(1)
    together = all_metrics(stacked, LABELS)
    for index in np.ndindex(3, 4):
        alone = all_metrics(stacked[index], LABELS)
        for name, value in alone.items():
            assert together[name][index] == pytest.approx(value), name


def test_auc_of_one_class_is_unknown() -> None:
    assert np.isnan(roc_auc(np.array([0.1, 0.9]), np.array([1, 1])))


def test_auc_with_an_unknown_probability_is_unknown() -> None:
    found = roc_auc(np.array([[0.1, np.nan, 0.9], [0.1, 0.5, 0.9]]), np.array([0, 1, 1]))
    assert found.tolist() == pytest.approx([np.nan, 1], nan_ok=True)


@given(PROBABILITIES)
def test_chosen_threshold_is_the_best_there_is(probabilities: np.ndarray) -> None:
    chosen = choose_threshold(probabilities, LABELS)
    best = max(
        balanced_accuracy(probabilities, LABELS, threshold)
        for threshold in [-0.01, *(np.unique(probabilities) + 1e-6)]
    )
    assert balanced_accuracy(probabilities, LABELS, chosen) >= best - 1e-12


def test_calling_everyone_is_a_choice_even_where_a_probability_is_zero() -> None:
    """Any threshold that spares the reactive patient at 1 spares tumoral ones, too."""
    probabilities, labels = np.array([0.0, 0.0, 1.0]), np.array([1, 1, 0])
    chosen = choose_threshold(probabilities, labels)
    assert chosen == EVERYONE
    assert (probabilities > chosen).all()
    assert json.loads(json.dumps(chosen)) == chosen


def test_a_threshold_of_each_patients_own() -> None:
    probabilities = np.array([0.2, 0.2, 0.6, 0.6])
    labels = np.array([0, 1, 0, 1])
    own = np.array([0.3, 0.1, 0.7, 0.5])
    assert balanced_accuracy(probabilities, labels, own) == 1
    both = np.stack([probabilities, probabilities])
    assert balanced_accuracy(both, labels, np.stack([own, 1 - own])).tolist() == [1, 0.5]


def test_of_equally_good_thresholds_the_one_nearest_to_a_half_is_taken() -> None:
    probabilities = np.array([0.1, 0.2, 0.8, 0.9])
    assert choose_threshold(probabilities, np.array([0, 0, 1, 1])) == pytest.approx(0.5)


def test_oracle_is_never_below_the_honest_threshold() -> None:
    probabilities = np.random.default_rng(1).random((20, 9))
    assert (
        oracle_balanced_accuracy(probabilities, LABELS) >= balanced_accuracy(probabilities, LABELS)
    ).all()


@given(PROBABILITIES, st.lists(st.integers(0, 2), min_size=9, max_size=9).map(np.array))
def test_auc_within_folds_compares_patients_of_one_fold(
    probabilities: np.ndarray, folds: np.ndarray
) -> None:
    pairs = [
        0.5 + 0.5 * np.sign(probabilities[t] - probabilities[r])
        for t in np.flatnonzero(LABELS == 1)
        for r in np.flatnonzero(LABELS == 0)
        if folds[t] == folds[r]
    ]
    found = fold_auc(probabilities, LABELS, folds)
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)
    drawn = np.array([0, 1, 1, 3, 4, 4, 5, 8, 8])
    twice = fold_auc(probabilities[drawn], LABELS[drawn], folds[drawn])
    counted = fold_auc(probabilities, LABELS, folds, np.bincount(drawn, minlength=9).astype(float))
    assert counted == pytest.approx(twice, nan_ok=True)


def test_auc_within_folds_is_blind_to_the_folds_scales() -> None:
    rng = np.random.default_rng(0)
    labels, folds = np.array([0, 1] * 20), np.arange(40) // 8
    probabilities = rng.random(40)
    shifted = probabilities + folds
    assert fold_auc(shifted, labels, folds) == fold_auc(probabilities, labels, folds)
    assert fold_auc(shifted, labels, 0 * folds) == pytest.approx(roc_auc(shifted, labels))
