"""Protocols: what is measured on whom, checked against direct computation on the curves."""

import numpy as np
import pytest

from lymphfeat.errors import LeakageError
from lymphfeat.guards import SharedImage
from lymphfeat.heads import resolve
from lymphfeat.metrics import balanced_accuracy, choose_threshold, log_loss
from lymphfeat.protocol import Outcome, run_protocol, witness_aucs
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat.splits import kfold_splits
from lymphfeat.training import Features, Fit, fit_heads

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


def run(features: Features, protocol: str, *, seeds: int, folds: int = 3) -> Outcome:
    return run_protocol(
        features,
        list(features.row),
        features.labels.numpy(),
        HEADS,
        FitSettings(protocol=protocol, epochs=12, batch_size=4, seeds=seeds, folds=folds),
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
        assert found["ba_half_width_published"] < found["ba_half_width"]


def _name(outcome: Outcome, start: str) -> str:
    return next(str(name) for name in outcome.summary["head"] if str(name).startswith(start))


def test_honest_thresholds_come_from_training_patients_alone(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
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
    expected = choose_threshold(np.array(probabilities), np.array(truth))
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
