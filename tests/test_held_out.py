"""Held-out patients say what decisions are worth, and when to abstain."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.predictive_values import PredictiveValues, Rates, check_prevalence
from lymphfeat.model.held_out import HeldOut, Scheme, answers
from lymphfeat.runtime.arrays import Floats

# Few values, so that ties occur.
Array = np.ndarray[Any, Any]
LOGITS = st.lists(st.integers(-4, 4).map(float), min_size=12, max_size=30)


def held_out(logits: Array, labels: Array, member: Array, scheme: Scheme) -> HeldOut:
    return HeldOut(
        scheme=scheme,
        logits=logits.astype(float),
        labels=labels.astype(np.int64),
        member=member.astype(np.int64),
    )


def reference_p(known: HeldOut, logits: Floats, label: int) -> float:
    """Return the p-value of one patient, whose members' logits are (M,)."""
    as_unlike, own = 1, 1
    for logit, its_label, member in zip(known.logits, known.labels, known.member, strict=True):
        if its_label == label:
            own += 1
            new = logits[member]
            as_unlike += (logit >= new) if label == 0 else (logit <= new)
    return as_unlike / own


@given(LOGITS, st.integers(0, 2**32 - 1))
def test_p_values_are_those_counted_one_by_one(logits: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = len(logits)
    known = held_out(np.array(logits), rng.integers(0, 2, n), rng.integers(0, 3, n), "members")
    new = rng.integers(-4, 5, (3, 5)).astype(float)
    found = known.p_values(new)
    for patient in range(5):
        for label in (0, 1):
            expected = reference_p(known, new[:, patient], label)
            assert found[patient, label] == pytest.approx(expected)


@given(LOGITS, st.sampled_from([0.1, 0.2, 0.35]), st.sampled_from([0, 1]))
def test_at_most_alpha_of_exchangeable_patients_are_ruled_out(
    logits: list[float], alpha: float, label: int
) -> None:
    """Of n + 1 patients of a class, each compared with the others, at most a share α is."""
    values = np.array(logits)
    ruled_out = 0
    for place in range(len(values)):
        others = np.delete(values, place)
        known = held_out(others, np.full(len(others), label), np.zeros(len(others)), "recalibrated")
        ruled_out += known.p_values(values[place].reshape(1, 1))[0, label] <= alpha
    assert ruled_out <= alpha * len(values) + 1e-9


def test_one_class_left_is_the_answer() -> None:
    p = np.array([[0.5, 0.05], [0.05, 0.5], [0.5, 0.5], [0.05, 0.05], [0.1, 0.5]])
    assert answers(p, 0.1) == ["reactive", "tumoral", "refer", "refer", "tumoral"]


def test_too_few_patients_to_abstain() -> None:
    labels = np.array([0] * 8 + [1] * 20)
    few = held_out(np.arange(28), labels, np.zeros(28), "refit")
    few.check_alpha(1 / 9)
    with pytest.raises(SettingsError, match=r"alpha \(=0\.1\) must .* 9 patients .* 8 "):
        few.check_alpha(0.1)
    with pytest.raises(SettingsError, match=r"alpha \(=1\) must be above 0 and below 1"):
        few.check_alpha(1)


RATES = Rates(tumoral=100, called_tumoral=90, reactive=50, called_reactive=40)


def test_predictive_values_are_shares_of_a_cohort_of_this_prevalence() -> None:
    found = PredictiveValues.at(0.3, RATES)
    # Of 10,000 patients 3,000 are tumoral; 2,700 of them and 1,400 others are called so.
    assert found.positive.value == pytest.approx(2700 / (2700 + 1400))
    assert found.negative.value == pytest.approx(5600 / (5600 + 300))
    again = PredictiveValues.at(100 / 150, RATES).positive.value
    assert again == pytest.approx(90 / 100)  # as counted


@given(st.floats(0.01, 0.98), st.integers(0, 40), st.integers(0, 40))
def test_predictive_values_rise_and_fall_with_prevalence(
    prevalence: float, called_tumoral: int, called_reactive: int
) -> None:
    rates = Rates(
        tumoral=40, called_tumoral=called_tumoral, reactive=40, called_reactive=called_reactive
    )
    low, high = (PredictiveValues.at(p, rates) for p in (prevalence, prevalence + 0.01))
    if not math.isnan(low.positive.value):
        assert low.positive.value <= high.positive.value + 1e-12
        assert low.positive.low <= low.positive.value <= low.positive.high
    if not math.isnan(low.negative.value):
        assert low.negative.value >= high.negative.value - 1e-12
        assert low.negative.low <= low.negative.value <= low.negative.high


def test_more_patients_narrow_the_interval() -> None:
    many = Rates(tumoral=1000, called_tumoral=900, reactive=500, called_reactive=400)
    few, more = (PredictiveValues.at(0.3, each).positive for each in (RATES, many))
    assert more.value == pytest.approx(few.value)
    assert more.high - more.low < 0.4 * (few.high - few.low)


def test_a_prevalence_is_a_share() -> None:
    with pytest.raises(SettingsError, match=r"prevalence \(=1\) must be above 0 and below 1"):
        check_prevalence(1)


def test_rates_count_right_calls() -> None:
    found = Rates.of(np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1]))
    assert found == Rates(tumoral=3, called_tumoral=2, reactive=2, called_reactive=1)
    assert (found.sensitivity, found.specificity) == (2 / 3, 1 / 2)
