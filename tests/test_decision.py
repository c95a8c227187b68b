"""Thresholds, decisions and their means against slow references and known truth."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.calibration import METHODS, Calibration, fit_calibrations, logit
from lymphfeat.evaluation.decision import (
    RULES,
    Decision,
    average,
    combine,
    cross_fit_decisions,
    learn_threshold,
    operating_point,
)
from lymphfeat.evaluation.metrics import EVERYONE, NOBODY, choose_threshold

LABELS = np.array([0, 1, 1] * 24)


def draw(
    seed: int = 0, *, distance: float = 1.8, slope: float = 1, shift: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw probabilities (P,) of two classes that lie `distance` apart, and labels."""
    z = np.random.default_rng(seed).normal(size=len(LABELS)) + distance * (LABELS - 0.5)
    return expit(slope * (distance * z + np.log(2)) + shift), LABELS


def learn(probabilities: np.ndarray, method: str) -> float:
    return Decision.learn(probabilities, LABELS, method=method).threshold


# --- prevalence ----------------------------------------------------------------------------------


def test_with_platt_prevalence_is_the_share_of_tumoral_patients() -> None:
    """The threshold of one number is the rule in words, up to Platt's smoothed targets."""
    probabilities, labels = draw(slope=2, shift=1)
    decision = Decision.learn(probabilities, labels)
    at = decision.calibrate(np.array([decision.threshold]))[0]
    assert at == pytest.approx(labels.mean(), abs=0.002)
    called = decision.calibrate(probabilities) > labels.mean() - 0.001
    assert (called == (probabilities > decision.threshold)).all()


@pytest.mark.parametrize("method", METHODS)
def test_prevalence_is_the_mean_calibrated_probability(method: str) -> None:
    probabilities, labels = draw(slope=0.5, shift=-1)
    (calibration,) = fit_calibrations(probabilities[None], labels, method)
    mean = calibration.apply(probabilities).mean()
    called = probabilities > learn(probabilities, method)
    assert (called == (calibration.apply(probabilities) > mean)).all()
    assert 0 < called.sum() < len(labels)


@pytest.mark.parametrize("method", METHODS)
def test_a_shift_of_the_logits_does_not_decide_who_is_tumoral(method: str) -> None:
    """What a model gets wrong for everyone alike must not call everyone tumoral."""
    drawn = [draw(shift=shift)[0] for shift in (-2, 0, 2)]
    called = [(probabilities > learn(probabilities, method)).mean() for probabilities in drawn]
    at_half = [(probabilities > 0.5).mean() for probabilities in drawn]
    assert np.ptp(called) < 0.7 * np.ptp(at_half)
    assert method != "platt" or np.ptp(called) == 0


@pytest.mark.parametrize("method", METHODS)
def test_at_a_slope_of_nearly_zero_the_middle_decides_and_rounding_does_not(method: str) -> None:
    """Misleading probabilities: every calibrated one is nearly the share of tumoral patients."""
    probabilities = 1 - draw(distance=0.8)[0]
    (calibration,) = fit_calibrations(probabilities[None], LABELS, method)
    if method != "none":
        assert calibration.slope < 0.01
    at = learn(probabilities, method)
    middle = logit(probabilities).mean() if method != "none" else logit(probabilities.mean())
    assert logit(np.array([at]))[0] == pytest.approx(middle, abs=0.05)
    stored = probabilities.astype(np.float32).astype(np.float64)
    assert ((stored > learn(stored, method)) == (probabilities > at)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [0.0, 1e-12, 0.1, 0.5, 2 / 3, 0.9, 1 - 1e-12, 1.0])
def test_equal_probabilities_exceed_nothing(constant: float, method: str) -> None:
    probabilities = np.full(len(LABELS), constant)
    assert not (probabilities > learn(probabilities, method)).any()


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9).map(np.array), st.sampled_from(METHODS))
def test_prevalence_calls_neither_all_nor_none_of_the_training_patients(
    probabilities: np.ndarray, method: str
) -> None:
    labels = np.array([0, 1, 1] * 3)
    at = Decision.learn(probabilities, labels, method=method).threshold
    assert json.loads(json.dumps(at, allow_nan=False)) == at
    logits = logit(probabilities)
    assert not (probabilities > at).all()
    if np.ptp(logits) > 1e-3:
        assert (probabilities > at).any()


def test_a_model_that_has_hardly_learnt_is_decided_where_it_is() -> None:
    """All probabilities within .69 ± .01, as after a few epochs; at .5 everyone is tumoral."""
    probabilities = expit(0.8 + 0.01 * (logit(draw()[0]) - np.log(2)))
    for method in METHODS:
        called = probabilities > learn(probabilities, method)
        balanced = (called[LABELS == 1].mean() + 1 - called[LABELS == 0].mean()) / 2
        assert balanced > 0.75


# --- other rules ---------------------------------------------------------------------------------


def test_other_rules() -> None:
    probabilities, labels = draw()
    best = Decision.learn(probabilities, labels, rule="best-ba")
    assert best.threshold == choose_threshold(probabilities, labels)
    assert best.threshold_from.startswith("best balanced accuracy, on out-of-fold probabilities")
    half = Decision.learn(probabilities, labels, rule="0.5")
    assert (half.threshold, half.threshold_from) == (0.5, "fixed at .5")
    assert half.calibration == best.calibration


def test_a_single_model_has_the_mean_of_those_it_was_trained_on() -> None:
    probabilities, _ = draw(slope=5)
    decision = Decision.of_fitted(probabilities)
    assert decision.threshold == pytest.approx(probabilities.mean())
    assert decision.threshold_from == (
        "the mean probability of the 72 training patients, as the model fits them"
    )
    assert decision.calibration is None
    assert not decision.operating_points
    assert Decision.of_fitted(probabilities, rule="0.5").threshold == 0.5
    with pytest.raises(
        SettingsError, match=r"threshold \(=best-ba\) must be chosen on out-of-fold"
    ):
        Decision.of_fitted(probabilities, rule="best-ba")


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]), min_size=9, max_size=9).map(np.array),
    st.sampled_from([0.5, 0.8, 0.9, 1.0]),
)
def test_operating_point_is_the_highest_that_reaches_its_sensitivity(
    probabilities: np.ndarray, target: float
) -> None:
    labels = np.array([0, 1, 1, 0, 1, 1, 0, 1, 1])
    tumoral = probabilities[labels == 1]
    found = operating_point(probabilities, labels, target)
    assert (tumoral > found).mean() >= target
    higher = [value for value in np.unique(probabilities) if value >= found]
    assert all((tumoral > value).mean() < target for value in higher)


def test_a_decision_is_learnt_and_survives_its_file() -> None:
    probabilities, labels = draw()
    decision = Decision.learn(probabilities, labels)
    assert set(decision.operating_points) == {"0.8", "0.9", "0.95", "0.99"}
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision
    sensitive = decision.at_sensitivity(0.95)
    assert sensitive.threshold == operating_point(probabilities, labels, 0.95)
    assert sensitive.calibration == decision.calibration


def test_a_model_file_without_calibration_is_read() -> None:
    found = Decision.from_json({"threshold": 0.4, "threshold_from": "somewhere"})
    assert found.calibration is None
    with pytest.raises(SettingsError, match=r"sensitivity \(=0.9\) must be an operating point"):
        found.at_sensitivity(0.9)


# --- several models ------------------------------------------------------------------------------


def test_models_are_averaged_as_calibrated_logits() -> None:
    decisions = [
        Decision(threshold=0.7, calibration=Calibration(slope=0.5, intercept=1)),
        Decision(threshold=0.2, calibration=Calibration(slope=2, intercept=-1)),
    ]
    probabilities = np.array([[0.1, 0.5, 0.9], [0.3, 0.6, 0.2]])
    found = average(decisions, probabilities)
    for patient in range(3):
        a, b = probabilities[:, patient]
        z = 0.5 * np.log(a / (1 - a)) + 1, 2 * np.log(b / (1 - b)) - 1
        assert found[patient] == pytest.approx(1 / (1 + np.exp(-(z[0] + z[1]) / 2)))
    at = combine(decisions).threshold
    z = 0.5 * np.log(0.7 / 0.3) + 1, 2 * np.log(0.2 / 0.8) - 1
    assert at == pytest.approx(1 / (1 + np.exp(-(z[0] + z[1]) / 2)))


@given(
    st.lists(st.floats(0, 1), min_size=6, max_size=6).map(np.array),
    st.sampled_from([EVERYONE, 0.0, 0.3, 0.5, 0.97, NOBODY]),
    st.sampled_from([None, Calibration(slope=3, intercept=-2), Calibration(slope=0.02)]),
)
def test_twice_the_same_model_decides_as_once(
    probabilities: np.ndarray, threshold: float, calibration: Calibration | None
) -> None:
    one = Decision(threshold=threshold, calibration=calibration)
    far = np.abs(logit(probabilities) - logit(np.clip(threshold, 0, 1))) > 1e-6
    both = average([one, one], np.stack([probabilities, probabilities]))
    called = both > combine([one, one]).threshold
    certain = np.abs(one.logits(probabilities)) < 15  # beyond, one is as good as another
    assert (called == (probabilities > threshold))[far & certain].all()


def test_a_mean_of_probabilities_is_not_decided_at_a_single_models_threshold() -> None:
    """Three sure models and a doubtful one, all of them above the threshold of .9 in the mean.

    Their probabilities' mean is below it.
    """
    decision = Decision(threshold=0.9, operating_points={"0.8": 0.95, "0.9": 0.9})
    probabilities = np.array([[0.999], [0.999], [0.999], [0.5]])
    assert probabilities.mean() < 0.9
    combined = combine([decision] * 4)
    assert average([decision] * 4, probabilities) > combined.threshold
    assert combined.threshold == pytest.approx(0.9)
    assert combined.operating_points == pytest.approx({"0.8": 0.95, "0.9": 0.9})
    assert combined.at_sensitivity(0.8).threshold == pytest.approx(0.95)


def test_only_operating_points_that_all_models_have_are_kept() -> None:
    one = Decision(operating_points={"0.8": 0.3, "0.9": 0.2}, calibration=Calibration())
    other = Decision(operating_points={"0.9": 0.4})
    assert list(combine([one, other]).operating_points) == ["0.9"]
    assert combine([one, other]).calibration is None
    assert combine([one, one]).calibration == Calibration()


# --- cross-fitting -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_each_fold_is_decided_by_the_others(rule: str, method: str) -> None:
    probabilities, labels = draw(slope=2, shift=1)
    folds = np.arange(len(labels)) // 6 % 3
    found = cross_fit_decisions(probabilities, labels, folds, rule=rule, method=method)
    for fold in range(3):
        inside, others = folds == fold, folds != fold
        (calibration,) = fit_calibrations(probabilities[None, others], labels[others], method)
        at = learn_threshold(
            rule, probabilities[others], labels[others], None if method == "none" else calibration
        )
        np.testing.assert_allclose(
            found.calibrated[inside], calibration.apply(probabilities[inside])
        )
        np.testing.assert_allclose(found.threshold[inside], at)


def test_a_folds_own_labels_decide_nothing_about_it() -> None:
    probabilities, labels = draw()
    folds = np.arange(len(labels)) // 6 % 3
    turned = np.where(folds == 1, 1 - labels, labels)
    before = cross_fit_decisions(probabilities, labels, folds, rule="best-ba")
    after = cross_fit_decisions(probabilities, turned, folds, rule="best-ba")
    same = folds == 1
    np.testing.assert_array_equal(after.calibrated[same], before.calibrated[same])
    np.testing.assert_array_equal(after.threshold[same], before.threshold[same])
    assert (after.threshold != before.threshold)[~same].any()
