"""Baselines, fusions, nested selection and their warnings, on made-up scores."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import check_grad
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from lymphfeat.cohort.attributes import Scaling, attribute_matrix, choose_attributes
from lymphfeat.cohort.splits import Plan, kfold_splits, report_splits
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.baselines import fit_baselines
from lymphfeat.evaluation.calibration import logit
from lymphfeat.evaluation.decision import RULES, Decision
from lymphfeat.evaluation.fusion import FUSIONS, _experts_loss, choose_fusions, fit_fusions
from lymphfeat.evaluation.intervals import estimate
from lymphfeat.evaluation.metrics import METRICS, roc_auc
from lymphfeat.evaluation.regression import learn_logistic
from lymphfeat.evaluation.scores import (
    PlannedPatients,
    Scores,
    measure,
    measure_as_reported,
    select_inside,
)
from lymphfeat.evaluation.summary import find_warnings, summarise

Table = dict[str, dict[str, Any]]

N = 90
IDS = [f"P{i}" for i in range(N)]
LABELS = np.array([0, 1, 1] * (N // 3))


def make_patients(seeds: int = 2, labels: np.ndarray = LABELS) -> PlannedPatients:
    repeats = kfold_splits(IDS, LABELS, folds=3, seeds=seeds)
    outer = [split for repeat in repeats for split in repeat.outer]
    return PlannedPatients(IDS, labels, Plan.nested(outer, dict(zip(IDS, LABELS, strict=True))))


def made_scores(patients: PlannedPatients, logits: np.ndarray, name: str = "head") -> Scores:
    """Let a head say the same of a patient whether it trained on it or not."""
    outer, inner, fitted = patients.empty(), patients.empty(), patients.empty()
    for place, (train, validation) in enumerate(
        zip(patients.train, patients.validation, strict=True)
    ):
        outer[place, validation] = expit(logits[validation])
        inner[place, train] = expit(logits[train])
        fitted[place, train] = expit(3 * logits[train])
    return Scores(name=name, kind="head", outer=outer, inner=inner, fitted=fitted)


def signal(strength: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return strength * (LABELS - 0.5) + rng.normal(size=N)


def figures(patients: PlannedPatients, *scores: Scores) -> tuple[pd.DataFrame, Table]:
    measured = [measure(patients, each) for each in scores]
    runs = pd.concat([part.runs for part in measured], ignore_index=True)
    predictions = pd.concat([part.predictions for part in measured], ignore_index=True)
    table = summarise(runs, predictions, patients.plan).to_dict("records")
    return runs, {str(row["head"]): {str(k): v for k, v in row.items()} for row in table}


# --- attributes ----------------------------------------------------------------------------------


def test_attributes_as_numbers() -> None:
    table = pd.DataFrame(
        {
            "label": [0, 1, 1],
            "split": ["train"] * 3,
            "age": [60.0, np.nan, 80.0],
            "gender": pd.Categorical(["F", None, "M"]),
            "lymph_count": [np.e, 1.0, np.e**2],
        },
        index=["P0", "P1", "P2"],
    )
    names = choose_attributes(table)
    assert names == ("age", "gender", "lymph_count")
    found = attribute_matrix(table, names)
    expected = np.array([[60, 1, 0, 1], [np.nan, np.nan, np.nan, 0], [80, 0, 1, 2]])
    np.testing.assert_allclose(found, expected)
    assert choose_attributes(table, ("age",)) == ("age",)
    with pytest.raises(SettingsError, match=r"attributes \(=cd5\) must be columns of .*: age, gen"):
        choose_attributes(table, ("cd5",))
    with pytest.raises(SettingsError, match="attribute age must be above 0 for its logarithm"):
        attribute_matrix(table.assign(age=[1.0, -2.0, 3.0]), ("age",), ("age",))


def test_missing_values_are_the_training_mean_and_constants_nothing() -> None:
    matrix = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0], [100.0, 9.0]])
    found = Scaling.of(matrix[:3]).apply(matrix)
    np.testing.assert_allclose(found, [[-1, 0], [1, 0], [0, 0], [98, 0]])


# --- baselines -----------------------------------------------------------------------------------


def test_logistic_regression_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 3)) * [1, 10, 100] + LABELS[:, None]
    ours = learn_logistic(x[:60], LABELS[:60])(x[60:])
    scaled = Scaling.of(x[:60]).apply(x)
    theirs = LogisticRegression(tol=1e-8).fit(scaled[:60], LABELS[:60])
    np.testing.assert_allclose(ours, theirs.predict_proba(scaled[60:])[:, 1], atol=1e-5)


def test_separable_patients_do_not_break_it() -> None:
    x = np.where(LABELS == 1, 1e6, -1e6)[:, None] + np.arange(float(N))[:, None]
    found = learn_logistic(x, LABELS)(x)
    assert np.isfinite(found).all()
    assert roc_auc(found, LABELS) == 1


def test_baselines_know_what_there_is_to_know() -> None:
    patients = make_patients()
    sizes = np.where(LABELS == 1, 60, 40) + np.arange(N) % 7
    _, table = figures(patients, *fit_baselines(patients, sizes, np.empty((N, 0))))
    assert list(table) == ["majority", "bag size"]
    assert (table["majority"]["ba"], table["majority"]["auc"]) == (0.5, 0.5)
    assert table["majority"]["sensitivity"] == 1
    assert table["bag size"]["ba"] > 0.98
    clinical = fit_baselines(patients, sizes, signal(2, 1)[:, None])[-1]
    assert clinical.name == "clinical"


# --- thresholds and calibration ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_threshold_and_calibration_come_from_training_patients(rule: str) -> None:
    patients = make_patients(seeds=1)
    scores = made_scores(patients, 4 * signal(2, 0) - 3)
    measured = measure(patients, scores, threshold=rule)
    for place, run in enumerate(measured.runs.to_dict("records")):
        train = patients.train[place]
        decision = Decision.learn(scores.inner[place, train], LABELS[train], rule=rule)
        assert run["threshold"] == pytest.approx(decision.threshold, abs=1e-12)
    assert measured.runs["log_loss_calibrated"].mean() < measured.runs["log_loss"].mean() - 0.2
    _, table = figures(patients, scores)
    assert table["head"]["ece_calibrated"] < table["head"]["ece"]


def test_without_inner_splits_the_threshold_is_that_of_a_single_model() -> None:
    plan = Plan.flat(report_splits(IDS, LABELS, seeds=2))
    patients = PlannedPatients(IDS, LABELS, plan)
    nothing = replace(made_scores(patients, signal(2, 0)), inner=patients.empty())
    measured = measure(patients, nothing)
    for place, found in enumerate(measured.runs["threshold"]):
        single = Decision.of_fitted(nothing.fitted[place, patients.train[place]])
        assert found == pytest.approx(single.threshold, abs=1e-12)
    assert (measure(patients, nothing, threshold="0.5").runs["threshold"] == 0.5).all()
    assert (
        measured.predictions["calibrated"] - measured.predictions["probability"]
    ).abs().max() < (1e-9)


# --- selection -----------------------------------------------------------------------------------


def test_selection_looks_at_training_patients_alone() -> None:
    """A head that is perfect on validation patients and worthless inside is not taken."""
    patients = make_patients()
    good, bad = made_scores(patients, signal(2, 0), "good"), made_scores(patients, signal(0, 1))
    perfect = np.where(np.isnan(bad.outer), np.nan, np.broadcast_to(LABELS, bad.outer.shape))
    tempting = replace(bad, name="tempting", outer=perfect)
    found = select_inside(patients, [tempting, good], "chosen")
    assert set(found.chosen) == {"good"}
    np.testing.assert_array_equal(found.outer, good.outer)


def test_the_best_of_many_worthless_heads_is_worthless_when_chosen_inside() -> None:
    patients = make_patients()
    heads = [
        replace(
            made_scores(patients, signal(0, seed), f"h{seed}"),
            inner=made_scores(patients, signal(0, 100 + seed)).inner,
        )
        for seed in range(40)
    ]
    _, table = figures(patients, *heads, select_inside(patients, heads, "chosen"))
    assert (
        max(row["ba"] for row in table.values()) > 0.58
    )  # chosen by eye, on the patients measured
    assert abs(table["chosen"]["ba"] - 0.5) < 0.07


# --- fusion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_of_independent_evidence_beats_both(name: str) -> None:
    patients = make_patients(seeds=3)
    head = made_scores(patients, 3 * signal(2, 0))
    attributes = np.column_stack([signal(2, 1), signal(0, 2)])
    attributes[::11, 0] = np.nan
    clinical = fit_baselines(patients, np.ones(N, int), attributes)[-1]
    (fused,) = fit_fusions(patients, [head], [name], attributes)
    _, table = figures(patients, head, clinical, fused)
    best_alone = max(table["head"]["auc"], table["clinical"]["auc"])
    assert table[f"head + clinical ({name})"]["auc"] > best_alone + 0.02


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_listens_to_out_of_fold_logits_alone(name: str) -> None:
    """A head that knows its training patients by heart must not drown the attributes.

    With in-sample logits (the leak) the fusion trusts the worthless head; out of fold it doesn't.
    """
    patients = make_patients()
    honest = made_scores(patients, 4 * signal(0, 0))
    leaked = np.where(np.isnan(honest.inner), np.nan, np.where(LABELS == 1, 0.99, 0.01))
    by_heart = replace(honest, name="leaked", inner=leaked)
    attributes = signal(2, 1)[:, None]
    fused = fit_fusions(patients, [honest, by_heart], [name], attributes)
    _, table = figures(patients, *fused)
    good = table[f"head + clinical ({name})"]["auc"]
    assert good > 0.85
    assert table[f"leaked + clinical ({name})"]["auc"] < good - 0.05


def test_gradient_of_the_experts() -> None:
    rng = np.random.default_rng(0)
    x, anchor = rng.normal(size=(20, 4)), rng.normal(size=11)

    def value(parameters: np.ndarray) -> float:
        return _experts_loss(parameters, x, LABELS[:20], anchor)[0]

    def slope(parameters: np.ndarray) -> np.ndarray:
        return _experts_loss(parameters, x, LABELS[:20], anchor)[1]

    assert check_grad(value, slope, rng.normal(size=11)) < 1e-4


def test_fusion_mistakes() -> None:
    patients = make_patients()
    attributes = signal(1, 1)[:, None]
    with pytest.raises(SettingsError, match=r"fusion \(=early\) must be one of late, sum, exp"):
        choose_fusions(["early"], patients.plan, attributes)
    with pytest.raises(SettingsError, match="the cohort's table has none"):
        choose_fusions(["late"], patients.plan, np.empty((N, 0)))
    flat = PlannedPatients(IDS, LABELS, Plan.flat(patients.plan.outer))
    with pytest.raises(SettingsError, match="fusion requires out-of-fold image logits"):
        choose_fusions(["late"], flat.plan, attributes)
    assert choose_fusions(["all"], patients.plan, attributes) == list(FUSIONS)


# --- warnings ------------------------------------------------------------------------------------


def test_warnings_name_who_does_not_beat_its_baseline() -> None:
    patients = make_patients(seeds=3)
    shortcut = np.exp(signal(0.6, 5) / 4 + 4).astype(int)
    follower = made_scores(patients, np.log(shortcut) * 4 - 16, "follower")
    seer = made_scores(patients, 5 * signal(9, 1), "seer")
    attributes = signal(3, 2)[:, None]
    baselines = fit_baselines(patients, shortcut, attributes)
    fused = fit_fusions(patients, [follower], ["late"], signal(0, 3)[:, None])
    runs, _ = figures(patients, follower, seer, *fused, *baselines)
    about_size, about_clinical = find_warnings(runs, patients.plan)
    assert about_size.startswith("follower: does not beat bag size alone (AUC 0.")
    assert "seer" not in about_size
    assert about_clinical.startswith("follower + clinical (late): does not beat clinical alone")


def test_a_single_split_neither_beats_nor_fails_to_beat() -> None:
    plan = Plan.flat(report_splits(IDS, LABELS, seeds=1))
    patients = PlannedPatients(IDS, LABELS, plan)
    scores = made_scores(patients, 9 * signal(9, 1), "seer")
    head = replace(scores, inner=patients.empty())
    baselines = fit_baselines(patients, np.arange(N) + 1, np.empty((N, 0)))
    runs = pd.concat([measure(patients, each).runs for each in (head, *baselines)])
    assert find_warnings(runs, plan) == (
        "seer: not compared with bag size alone, because a single split gives no interval. "
        "Use more --seeds.",
    )


def test_under_report_a_last_epoch_is_set_against_bag_size() -> None:
    """A head that says nothing has lucky epochs; the best of them must not count as a gain."""
    plan = Plan.flat(report_splits(IDS, LABELS, seeds=10))
    patients = PlannedPatients(IDS, LABELS, plan)
    rng = np.random.default_rng(0)
    baselines = fit_baselines(patients, np.full(N, 20), np.empty((N, 0)))
    runs = []
    for each in baselines:
        curves = [each.outer[place, rows][None] for place, rows in enumerate(patients.validation)]
        runs.append(measure_as_reported(patients, each, curves).runs)
    curves = [rng.uniform(size=(200, len(rows))) for rows in patients.validation]
    outer = patients.empty()
    for place, rows in enumerate(patients.validation):
        outer[place, rows] = curves[place][-1]
    nothing = patients.empty()
    lucky = Scores(name="lucky", kind="head", outer=outer, inner=nothing, fitted=nothing)
    measured = measure_as_reported(patients, lucky, curves)
    assert (measured.predictions["threshold"] == 0.5).all()
    runs.append(measured.runs)
    table = pd.concat(runs)
    best, bag = (table.loc[table["head"] == name, "auc"] for name in ("lucky", "bag size"))
    assert estimate((best.to_numpy() - bag.to_numpy()), plan.test_to_train).low > 0
    (warning,) = find_warnings(table, plan)
    assert warning.startswith("lucky: does not beat bag size alone (AUC 0.")
    assert "heads at their last epoch" in warning


def test_intervals_of_shares_stay_within_0_and_1() -> None:
    patients = make_patients(seeds=1)
    good = made_scores(patients, signal(3.5, 0))
    _, table = figures(patients, good)
    row = table["head"]
    assert row["ba"] + row["ba_half_width"] > 1  # as a t interval knows no bounds
    assert row["ba_high"] == 1
    assert row["ba_low"] == pytest.approx(row["ba"] - row["ba_half_width"])
    for name in METRICS:
        assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        if name != "log_loss":
            assert row[f"{name}_high"] <= 1


def test_a_faultless_head_still_has_an_interval() -> None:
    patients = make_patients(seeds=1)
    _, table = figures(patients, made_scores(patients, 20 * (LABELS - 0.5)))
    row = table["head"]
    assert (row["ba"], row["ba_high"]) == (1, 1)
    assert row["ba_low"] == pytest.approx(1 - row["ba_half_width"])
    assert row["ba_low"] ** (N // 3) == pytest.approx(0.025)  # the 30 reactive patients


# --- leak guards ---------------------------------------------------------------------------------


def _learnt(
    seen: np.ndarray, attributes: np.ndarray, logits: np.ndarray, sizes: np.ndarray
) -> list[np.ndarray]:
    """Return all that one split (the first) says of its training patients, and its thresholds."""
    patients = make_patients(seeds=1, labels=seen)
    head = made_scores(patients, logits)
    found = [*fit_baselines(patients, sizes, attributes)]
    found += fit_fusions(patients, [head], list(FUSIONS), attributes)
    found.append(select_inside(patients, [head, *found[:2]], "chosen"))
    told = []
    for each in found:
        told += [each.inner[0], measure(patients, each).runs["threshold"].to_numpy()[:1]]
    return told


def test_nothing_is_learnt_from_a_splits_validation_patients() -> None:
    """Scalers, weights, thresholds, selections: all as before when validation patients change.

    Their labels are turned round, their attributes, logits and bag sizes made absurd.
    """
    attributes = np.column_stack([signal(1, 1), signal(1, 2)])
    logits, sizes = signal(1, 0), np.arange(N) % 30 + 20
    before = _learnt(LABELS, attributes, logits, sizes)
    changed = make_patients(seeds=1).validation[0]
    labels, sizes = LABELS.copy(), sizes.copy()
    labels[changed] = 1 - labels[changed]
    attributes[changed] = 1e6
    logits[changed] *= -50
    sizes[changed] = 9999
    for was, now in zip(before, _learnt(labels, attributes, logits, sizes), strict=True):
        np.testing.assert_array_equal(was, now)


def test_the_guard_above_sees_a_leak_when_there_is_one() -> None:
    attributes = signal(1, 1)[:, None]
    changed = make_patients(seeds=1).validation[0]
    everyone = Scaling.of(attributes).apply(attributes)  # a scaler fitted on all patients
    before = logit(learn_logistic(everyone[:60], LABELS[:60])(everyone[:60]))
    attributes[changed] = 1e6
    leaked = Scaling.of(attributes).apply(attributes)
    after = logit(learn_logistic(leaked[:60], LABELS[:60])(leaked[:60]))
    assert not np.allclose(before, after)
