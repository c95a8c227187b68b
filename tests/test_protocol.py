"""Protocols: what is measured on whom, checked against direct computation on the curves."""

from typing import Any

import numpy as np
import pytest

from lymphfeat.cohort.splits import Plan, Split, kfold_splits
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.evaluation.decision import RULES, Decision
from lymphfeat.evaluation.intervals import estimate, t_half_width
from lymphfeat.evaluation.leakage import SharedImage
from lymphfeat.evaluation.metrics import METRICS, balanced_accuracy, log_loss
from lymphfeat.evaluation.protocol import (
    Outcome,
    SplitFeatures,
    own_plan,
    run_protocol,
    witness_aucs,
)
from lymphfeat.heads.engine.engine import fit_heads
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.grid import resolve
from lymphfeat.settings import FitSettings, HeadSettings

PATIENTS = 30
HEADS = [
    resolve(HeadSettings(agg="mean", lr=0.1)),
    resolve(HeadSettings(agg="topk", k_agg=2, lr=0.1)),
]


@pytest.fixture(scope="module")
def features() -> Features:
    """Tumoral patients carry an image with a high first channel; the last three have no label."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 6, PATIENTS)
    labels = np.array([0, 1] * (PATIENTS // 2), np.int64)
    maps = rng.normal(size=(sizes.sum(), 4, 1, 1))
    offsets = np.concatenate([[0], sizes.cumsum()])
    maps[offsets[:-1][labels == 1], 0] += 5
    labels[-3:] = -1
    return Features(
        maps.astype(np.float16),
        maps[..., 0, 0].astype(np.float16).astype(np.float32),
        offsets,
        [f"P{i}" for i in range(PATIENTS)],
        labels,
    )


def run(
    features: Features, protocol: str, *, seeds: int, folds: int = 3, threshold: str = "prevalence"
) -> Outcome:
    return run_protocol(
        features,
        list(features.row),
        features.labels.numpy(),
        HEADS,
        FitSettings(
            protocol=protocol,
            epochs=12,
            batch_size=4,
            seeds=seeds,
            folds=folds,
            threshold=threshold,
        ),
    )


def test_report_protocol_averages_the_ten_best_epochs_of_each_run(features: Features) -> None:
    outcome = run(features, "report", seeds=3)
    labels = features.labels.numpy()
    for head, row in enumerate(("mean", "top2")):
        figures = []
        for i, split in enumerate(outcome.splits):
            rows = features.rows_of(split.validation)
            curves = outcome.fitted.curves[head * 3 + i][:, rows].astype(float)
            scores = [float(balanced_accuracy(curve, labels[rows])) for curve in curves]
            figures.append(np.mean(sorted(scores)[-10:]))
        found = outcome.summary.set_index("head").loc[_name(outcome, row)]
        assert found["ba"] == pytest.approx(np.mean(figures))
        assert found["ba_oracle"] >= found["ba"] - 1e-9
        own = outcome.runs[outcome.runs["head"] == _name(outcome, row)]
        ratio = Plan.flat(outcome.splits).test_to_train
        corrected = estimate(own["ba"].to_numpy(float), ratio, bounds=(0, 1))
        assert found["ba_half_width"] == pytest.approx(corrected.half_width)
        assert (found["ba_low"], found["ba_high"]) == (corrected.low, corrected.high)
        assert found["ba_half_width_published"] < found["ba_half_width_uncorrected"]
        assert found["ba_half_width_uncorrected"] == pytest.approx(
            t_half_width(own["ba"].to_numpy(float))
        )
        assert found["ba_half_width"] > 1.9 * found["ba_half_width_uncorrected"]
        oracle = estimate(own["ba_oracle"].to_numpy(float), ratio, bounds=(0, 1))
        assert found["ba_oracle_low"] == oracle.low
        last = outcome.epochs[outcome.epochs["epoch"] == 12]
        assert found["auc_last"] == pytest.approx(
            last.loc[last["head"] == found.name, "auc"].mean()
        )


def _name(outcome: Outcome, start: str) -> str:
    return next(str(name) for name in outcome.summary["head"] if str(name).startswith(start))


@pytest.mark.parametrize("rule", RULES)
def test_honest_thresholds_come_from_training_patients_alone(features: Features, rule: str) -> None:
    outcome = run(features, "honest", seeds=2, folds=3, threshold=rule)
    labels = features.labels.numpy()
    ids = [patient for patient, label in zip(features.row, labels, strict=True) if label >= 0]
    repeats = kfold_splits(ids, labels[labels >= 0], folds=3, seeds=2)
    repeat, fold = repeats[1], 2
    outer = repeat.outer[fold]
    probabilities, truth = [], []
    for split in repeat.inner(fold):
        fit = fit_heads(features, [Fit(head=HEADS[0], split=split)], epochs=12, batch_size=4)
        rows = [features.row[p] for p in split.validation if p not in outer.validation]
        probabilities += fit.curves[0, -1, rows].tolist()
        truth += labels[rows].tolist()
    expected = Decision.learn(np.array(probabilities), np.array(truth), rule=rule).threshold
    runs = outcome.runs.set_index(["head", "split"])
    found = runs.loc[(_name(outcome, "mean"), outer.id), "threshold"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_predictions_hold_every_labelled_patient_once_a_repeat(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
    heads = outcome.predictions[outcome.predictions["kind"] == "head"]
    counts = heads.groupby(["head", "patient"]).size()
    assert (counts == 2).all()
    assert len(counts) == 2 * (PATIENTS - 3)
    assert not set(outcome.predictions["patient"]) & {"P27", "P28", "P29"}


def test_every_epoch_of_every_fit_is_kept(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
    assert len(outcome.epochs) == 2 * 6 * 12
    assert outcome.epochs[["ba", "auc", "loss"]].notna().all().all()


def test_easy_cohort_is_learnt_and_witnesses_found(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
    assert outcome.summary["auc"].max() > 0.9
    patients = features.bags.index.numpy()
    witness = np.zeros(len(patients), bool)
    starts = features.offsets[:-1][features.labels.numpy() == 1]
    witness[starts] = True
    aucs = witness_aucs(outcome, features, patients, witness)
    assert aucs.max() > 0.95
    assert aucs.min() > 0.8


def test_evaluating_a_patient_the_backbone_was_trained_on_is_refused(features: Features) -> None:
    with pytest.raises(LeakageError, match="learnt from the labels of P3; nothing must"):
        run_protocol(
            features,
            list(features.row),
            features.labels.numpy(),
            HEADS,
            FitSettings(seeds=1, folds=3),
            seen=lambda split: {"P3"} & {*split.validation},
        )


def test_one_image_in_training_and_validation_patients_is_refused(features: Features) -> None:
    patients, names = ("P3", "P4", "P5", "P6", "P7"), ("1.png", "2.png", "3.png", "4.png", "5.png")
    with pytest.raises(LeakageError, match=r"1.png of P3 = 2.png of P4 = .* by split kfold3"):
        run_protocol(
            features,
            list(features.row),
            features.labels.numpy(),
            HEADS,
            FitSettings(seeds=1, folds=3),
            shared=[SharedImage(patients=patients, names=names)],
        )


def test_nested_epoch_is_the_best_inside_the_training_patients(features: Features) -> None:
    outcome = run_protocol(
        features,
        list(features.row),
        features.labels.numpy(),
        HEADS[:1],
        FitSettings(epochs=6, batch_size=4, seeds=1, folds=3, epoch="nested"),
    )
    labels = features.labels.numpy()
    ids = [patient for patient, label in zip(features.row, labels, strict=True) if label >= 0]
    (repeat,) = kfold_splits(ids, labels[labels >= 0], folds=3, seeds=1)
    inner = [Fit(head=HEADS[0], split=split) for split in repeat.inner(1)]
    fitted = fit_heads(features, inner, epochs=6, batch_size=4)
    probabilities, truth = [], []
    for i, split in enumerate(repeat.inner(1)):
        rows = features.rows_of([p for p in split.validation if p in repeat.outer[1].train])
        probabilities.append(fitted.curves[i][:, rows].astype(float))
        truth.append(labels[rows])
    losses = log_loss(np.concatenate(probabilities, axis=1), np.concatenate(truth))
    runs = outcome.runs[outcome.runs["kind"] == "head"].set_index("split")
    assert runs["chosen"]["kfold3-r0-f1"] == f"epoch {losses.argmin() + 1}"


# --- splits of one's own -------------------------------------------------------------------------

KNOWN = [f"P{i}" for i in range(PATIENTS - 3)]
DOTTED = [
    Split(id="a", seed=0, repeat=0, train=tuple(KNOWN[:15]), validation=tuple(KNOWN[15:])),
    Split(id="a.1", seed=1, repeat=1, train=tuple(KNOWN[15:]), validation=tuple(KNOWN[:15])),
]


def run_on(
    features: Features | SplitFeatures, labels: np.ndarray, splits: list[Split], **changes: Any
) -> Outcome:
    settings = FitSettings(epochs=12, batch_size=4, folds=3, **changes)
    ids = [f"P{i}" for i in range(PATIENTS)]
    return run_protocol(features, ids, labels, HEADS[:1], settings, splits=splits)


def test_every_split_of_a_file_is_measured_whatever_its_name(features: Features) -> None:
    labels = features.labels.numpy()
    both = run_on(features, labels, DOTTED)
    for split in DOTTED:
        alone = run_on(features, labels, [split]).runs
        found = both.runs[both.runs["split"] == split.id].set_index("head")
        assert len(found) == len(alone)
        for name in METRICS:
            expected = alone.set_index("head")[name]
            np.testing.assert_allclose(found[name], expected.loc[found.index], atol=1e-5)


def test_every_split_with_features_of_its_own_is_measured(features: Features) -> None:
    ids = list(features.row)
    sizes = features.bags.sizes.numpy()
    own = SplitFeatures(DOTTED, ids, sizes, lambda split: features)
    outcome = run_on(own, features.labels.numpy(), DOTTED[1:])
    assert [split.id for split in outcome.splits] == ["a.1"]
    plan = own_plan(own, dict(zip(ids, features.labels.tolist(), strict=True)), FitSettings())
    assert plan == Plan.flat(DOTTED)


def test_without_backbones_inside_a_training_set_nothing_is_chosen_and_that_is_said(
    features: Features,
) -> None:
    labels = features.labels.numpy()
    own = SplitFeatures(DOTTED, list(features.row), features.bags.sizes.numpy(), lambda _: features)
    outcome = run_on(own, labels, DOTTED)
    assert outcome.thresholds == "prevalence, from training patients as fitted"
    assert outcome.warnings[0].startswith("thresholds are not from out-of-fold probabilities")
    with pytest.raises(
        SettingsError, match=r"epoch \(=nested\) must be chosen on out-of-fold .*inner"
    ):
        run_on(own, labels, DOTTED, epoch="nested")
    inner = Plan.nested(DOTTED, dict(zip(features.row, labels.tolist(), strict=True)), folds=3)
    whole = SplitFeatures(
        [*DOTTED, *inner.inner_once],
        list(features.row),
        features.bags.sizes.numpy(),
        lambda _: features,
    )
    nested = run_on(whole, labels, DOTTED, epoch="nested")
    assert nested.thresholds == "prevalence, from training patients out of fold"
    assert not nested.warnings or "thresholds" not in nested.warnings[0]
    same = run_on(features, labels, DOTTED, epoch="nested")
    heads = [each.runs.loc[each.runs["kind"] == "head"] for each in (nested, same)]
    assert heads[0]["chosen"].tolist() == heads[1]["chosen"].tolist()
    np.testing.assert_allclose(heads[0]["threshold"], heads[1]["threshold"], atol=1e-5)


def test_one_class_splits_are_refused_wherever_they_come_from(features: Features) -> None:
    labels = features.labels.numpy()
    odd = Split(id="odd", seed=0, repeat=0, train=tuple(KNOWN[:20]), validation=("P21", "P23"))
    own = SplitFeatures([odd], list(features.row), features.bags.sizes.numpy(), lambda _: features)
    for given in (features, own):
        with pytest.raises(SettingsError, match="validation patients of split odd must incl"):
            run_on(given, labels, [odd])


def test_halves_of_a_rare_class_are_measured_without_nan(features: Features) -> None:
    """Two reactive patients: half of all seeds would leave one side without any."""
    labels = np.ones(PATIENTS, np.int64)
    labels[[3, 11]] = 0
    outcome = run_on(features, labels, None, protocol="report", seeds=6)  # type: ignore[arg-type]
    assert outcome.runs[list(METRICS)].notna().all(axis=None)
    assert [split.seed for split in outcome.splits] != list(range(6))


def test_epochs_that_are_never_looked_at_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"evaluate_every \(=3\) must be at most epochs \(=2\)"):
        FitSettings(epochs=2, evaluate_every=3)
