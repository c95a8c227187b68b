"""Calibration and operating points against scikit-learn, slow references and known truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from lymphfeat.evaluation.calibration import (
    Calibration,
    calibration_error,
    fit_calibrations,
    logit,
    reliability,
)


def overconfident(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw probabilities whose logits are three times too large and moved by 1, and labels."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, n)
    labels = (rng.random(n) < expit(true)).astype(int)
    return expit(3 * true + 1), labels


def test_platt_is_an_unpenalised_logistic_regression() -> None:
    """With many patients the smoothed targets are the labels."""
    probabilities, labels = overconfident(4000)
    (found,) = fit_calibrations(probabilities[None], labels)
    model = LogisticRegression(C=1e9, tol=1e-8).fit(logit(probabilities)[:, None], labels)
    assert found.slope == pytest.approx(model.coef_[0, 0], rel=0.01)
    assert found.intercept == pytest.approx(model.intercept_[0], abs=0.01)


@pytest.mark.parametrize("spread", [1, 0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("middle", [-3, 0, 0.6, 6])
def test_platt_does_not_care_where_logits_lie_nor_how_close(middle: float, spread: float) -> None:
    """Models that have hardly learnt give everyone nearly the same probability."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 1] * 24)
    z = rng.normal(size=72) + 1.8 * labels
    (plain,) = fit_calibrations(expit(z)[None], labels)
    probabilities = expit(middle + spread * (z - z.mean()))
    (found,) = fit_calibrations(probabilities[None], labels)
    expected = plain.apply(expit(z))
    np.testing.assert_allclose(found.apply(probabilities), expected, atol=1e-4)


def test_equal_probabilities_become_the_share_of_tumoral_patients() -> None:
    labels = np.array([0, 1, 1] * 10)
    (found,) = fit_calibrations(np.full((1, 30), 0.6), labels)
    assert found.apply(np.array([0.6])) == pytest.approx([0.66], abs=0.01)
    assert found.slope == pytest.approx(0, abs=0.01)  # nothing was learnt about other values


@given(st.floats(-14, 14), st.floats(0.01, 5), st.floats(-5, 5))
def test_a_calibration_is_undone(x: float, slope: float, intercept: float) -> None:
    calibration = Calibration(slope=slope, intercept=intercept)
    p = expit(np.array([x]))
    calibrated = calibration.apply(p)
    if abs(logit(calibrated)[0]) < 14:
        assert logit(calibration.undo(calibrated))[0] == pytest.approx(x, abs=1e-6)


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_overconfidence_is_undone_on_new_patients(method: str) -> None:
    (found,) = fit_calibrations(*_rows(overconfident(2000)), method)
    probabilities, labels = overconfident(4000, seed=1)
    before = calibration_error(probabilities, labels)
    after = calibration_error(found.apply(probabilities), labels)
    assert before > 0.1
    assert after < (0.03 if method == "platt" else 0.08)
    assert (found.intercept == 0) == (method == "temperature")


def _rows(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pair[0][None], pair[1]


def test_many_at_once_are_each_alone_whoever_is_left_out() -> None:
    probabilities, labels = overconfident(40)
    stacked = np.stack([probabilities, probabilities**2])
    stacked[0, :10] = np.nan
    together = fit_calibrations(stacked, labels)
    (alone,) = fit_calibrations(stacked[0][None, 10:], labels[10:])
    assert together[0].slope == pytest.approx(alone.slope)
    assert together[0].intercept == pytest.approx(alone.intercept)
    beside = np.stack([stacked[0], expit(0.02 * logit(probabilities) - 3)])
    assert fit_calibrations(beside, labels)[0] == together[0]  # to the bit


@given(
    st.lists(st.floats(0, 1), min_size=8, max_size=8).map(np.array),
    st.sampled_from(["platt", "temperature"]),
)
def test_the_ranking_is_never_turned_round(probabilities: np.ndarray, method: str) -> None:
    labels = np.array([0, 1] * 4)
    (found,) = fit_calibrations(probabilities[None], labels, method)
    order = np.argsort(probabilities)
    assert (np.diff(found.apply(probabilities)[order]) >= 0).all()
    assert np.isfinite([found.slope, found.intercept]).all()


def test_worthless_probabilities_become_the_share_of_tumoral_patients() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([1] * 30 + [0] * 10)
    misleading = np.where(labels == 1, 0.2, 0.8) + rng.uniform(-0.1, 0.1, 40)
    (found,) = fit_calibrations(misleading[None], labels)
    assert found.apply(misleading) == pytest.approx(np.full(40, 0.74), abs=0.02)


def test_no_calibration_changes_nothing() -> None:
    (found,) = fit_calibrations(*_rows(overconfident(10)), "none")
    assert found.apply(np.array([0.2, 0.7])) == pytest.approx([0.2, 0.7])


def test_reliability_and_its_error_by_hand() -> None:
    probabilities = np.array([0.05, 0.05, 0.55, 0.55, 0.95, 1.0])
    labels = np.array([0, 1, 1, 1, 1, 1])
    found = reliability(probabilities, labels)
    assert found.patients.tolist() == [2, 2, 2]
    assert found.predicted == pytest.approx([0.05, 0.55, 0.975])
    assert found.observed == pytest.approx([0.5, 1, 1])
    assert found.error == pytest.approx((0.45 + 0.45 + 0.025) / 3)


def test_calibration_keeps_certainty_finite() -> None:
    assert np.isfinite(Calibration(slope=2, intercept=1).apply(np.array([0.0, 1.0]))).all()
