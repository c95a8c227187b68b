"""Simulated studies of thresholds: nothing is claimed where there is nothing, and who wins where.

benchmarks/thresholds.py does the same at length; docs/protocols.md has its figures.
"""

from functools import partial

import numpy as np
import pytest

from lymphfeat.evaluation.decision import RULES
from tests.simulated_thresholds import (
    Ensemble,
    Situation,
    collect,
    compare_rules,
    decide_ensemble,
    decide_noise,
    mean_and_error,
    measure_noise,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n", [72, 163])
def test_members_without_any_signal_have_a_balanced_accuracy_of_one_half(n: int) -> None:
    found = collect(partial(decide_noise, n=n), 250)
    for name in (*RULES, "AUC within folds"):
        mean, error = mean_and_error(found[name])
        assert abs(mean - 0.5) <= 3 * error, name
    # The threshold that was chosen on the patients measured does not: so the test can fail.
    mean, error = mean_and_error(found["best-ba, naive"])
    assert mean - 0.5 > 10 * error


@pytest.mark.parametrize("n", [72, 163])
def test_rows_of_fit_head_without_any_signal_have_it_too(n: int) -> None:
    found = collect(partial(measure_noise, n=n), 100)
    for rule in RULES:
        mean, error = mean_and_error(found[rule])
        assert abs(mean - 0.5) <= 3 * error, rule


def test_members_that_have_learnt_noise_are_not_taken_for_more() -> None:
    """The other folds' members have seen the labels: what that adds is small beside the naive."""
    found = collect(partial(decide_noise, n=72, learnt=True), 200)
    for rule in RULES:
        mean, error = mean_and_error(found[rule])
        assert abs(mean - 0.5) <= 0.01 + 3 * error, rule
    assert found["best-ba, naive"].mean() > 0.55


@pytest.mark.parametrize("slope", [0.5, 2])
def test_prevalence_beats_the_other_rules_where_its_calibration_fits(slope: float) -> None:
    """Normal scores, equally wide: paired by study, and beyond three standard errors."""
    situation = Situation(n=72, auc=0.8, slope=slope, shift=1)
    found = collect(
        partial(compare_rules, situation=situation, methods=("platt", "temperature", "none")), 200
    )
    for rule in ("best-ba", "0.5"):
        mean, error = mean_and_error(found["prevalence, platt"] - found[rule])
        assert mean > 3 * error, rule
    # Exceeding the share itself is worse where nothing can move the probabilities to it.
    for method in ("temperature", "none"):
        mean, error = mean_and_error(found[f"prevalence, {method}"] - found[f"share, {method}"])
        assert mean > 3 * error, method


def test_the_true_balanced_accuracy_is_that_of_many_patients() -> None:
    for situation in (
        Situation(n=200_000, auc=0.8, slope=2, shift=1),
        Situation(n=200_000, auc=0.9, slope=0.5, spread=2),
    ):
        probabilities, labels = situation.draw(np.random.default_rng(0))
        for at in (0.5, 0.8):
            sensitivity = (probabilities[labels == 1] > at).mean()
            specificity = (probabilities[labels == 0] <= at).mean()
            found = situation.true_ba(at)
            assert found == pytest.approx((sensitivity + specificity) / 2, abs=0.005)


@pytest.mark.parametrize("rule", ["prevalence", "best-ba"])
def test_an_ensemble_is_decided_on_the_scale_of_its_threshold(rule: str) -> None:
    ensemble = Ensemble(n=72, slope=2, noise=0.5)
    found = collect(partial(decide_ensemble, ensemble=ensemble, rule=rule), 40)
    mean, error = mean_and_error(found["ba new"] - found["ba old"])
    assert mean > 3 * error
    assert mean > 0.015
    assert found["called new"].mean() == pytest.approx(0.62, abs=0.03)
    assert (found["mean probability at it"] < found["threshold"]).mean() > 0.8
