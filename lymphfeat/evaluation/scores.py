"""What heads, fusions and baselines predict under a plan of splits, and how well (METHOD §4).

Whatever is measured is a `Scores`. What is chosen for a split (the threshold, the calibration, one
of several heads) is chosen on its training patients' out-of-fold probabilities, and measured on its
validation patients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lymphfeat.cohort.splits import Plan, Split
from lymphfeat.evaluation.calibration import Calibration, fit_calibrations
from lymphfeat.evaluation.decision import HALF, PREVALENCE, Decision, learn_threshold
from lymphfeat.evaluation.intervals import bootstrap_metrics
from lymphfeat.evaluation.metrics import (
    all_metrics,
    brier_score,
    fold_auc,
    log_loss,
    oracle_balanced_accuracy,
    roc_auc,
)
from lymphfeat.runtime.arrays import Floats, Labels

Kind = Literal["head", "fusion", "selected", "average", "baseline"]
PredictFunction = Callable[[Floats], Floats]  # inputs (m, D) -> probabilities (m,)
Learner = Callable[[Floats, Labels], PredictFunction]  # of training patients, (n, D) and (n,)

BEST_EPOCHS = 10  # of each run, averaged under `report` (METHOD §4)
MAJORITY, BAG_SIZE, CLINICAL = "majority", "bag size", "clinical"


class PlannedPatients:
    """The patients of a plan: their labels, and their rows on each side of each split."""

    def __init__(self, ids: Sequence[str], labels: Labels, plan: Plan) -> None:
        """Take all patients, (P,) each; those without a label are in none of the splits."""
        self.ids, self.labels, self.plan = np.array(ids), labels, plan
        self._row = {patient: row for row, patient in enumerate(ids)}
        self.train = [self.rows(split.train) for split in plan.outer]
        self.validation = [self.rows(split.validation) for split in plan.outer]

    def rows(self, patients: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of patients by their ids."""
        return np.array([self._row[patient] for patient in patients], dtype=np.int64)

    def inner(self, place: int) -> list[tuple[Split, NDArray[np.int64]]]:
        """Return an outer split's inner splits, each with the rows that it may judge."""
        train = set(self.plan.outer[place].train)
        return [
            (split, self.rows([patient for patient in split.validation if patient in train]))
            for split in self.plan.inner[place]
        ]

    def empty(self) -> Floats:
        """Return (S, P) of NaN."""
        return np.full((len(self.plan.outer), len(self.ids)), np.nan)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The probabilities of one head, fusion or baseline in each split: (S, P), NaN if not judged.

    A patient is judged by what has not been trained on it, except in `fitted`.
    """

    name: str
    kind: Kind
    outer: Floats  # of validation patients, learnt from all training patients
    inner: Floats  # of training patients, out of fold; all NaN without inner splits
    fitted: Floats  # of training patients, as they were fitted
    chosen: tuple[str, ...] = ()  # (S,) what was chosen on the training patients: an epoch, a head


def cross_fit(
    patients: PlannedPatients,
    learner: Learner,
    inputs: Callable[[int], Floats],
    *,
    name: str,
    kind: Kind,
) -> Scores:
    """Fit a learner on the training patients of every split, and out of fold inside them.

    `inputs` returns the inputs (P, D) for the outer split at a place in the plan.
    """
    outer, inner, fitted = patients.empty(), patients.empty(), patients.empty()
    labels = patients.labels
    for place, (train, validation) in enumerate(
        zip(patients.train, patients.validation, strict=True)
    ):
        given = inputs(place)
        predict = learner(given[train], labels[train])
        outer[place, validation] = predict(given[validation])
        fitted[place, train] = predict(given[train])
        for split, rows in patients.inner(place):
            learnt = patients.rows(split.train)
            inner[place, rows] = learner(given[learnt], labels[learnt])(given[rows])
    return Scores(name=name, kind=kind, outer=outer, inner=inner, fitted=fitted)


def select_inside(patients: PlannedPatients, candidates: Sequence[Scores], name: str) -> Scores:
    """Take for each split the candidate that is best on its training patients, out of fold.

    Best is the highest AUC; ties go to the lowest log loss, then to the first: nested selection.
    """
    best = []
    for place, train in enumerate(patients.train):
        stacked = np.stack([scores.inner[place, train] for scores in candidates])  # (H, n)
        best.append(candidates[find_best(stacked, patients.labels[train])])
    return Scores(
        name=name,
        kind="selected",
        outer=np.stack([scores.outer[place] for place, scores in enumerate(best)]),
        inner=np.stack([scores.inner[place] for place, scores in enumerate(best)]),
        fitted=np.stack([scores.fitted[place] for place, scores in enumerate(best)]),
        chosen=tuple(_described(scores, place) for place, scores in enumerate(best)),
    )


def find_best(probabilities: Floats, labels: Labels) -> int:
    """Return which of H out-of-fold probabilities (H, n) has the highest AUC; see `select_inside`.

    labels: (n,).
    """
    auc, loss = roc_auc(probabilities, labels), log_loss(probabilities, labels)
    return int(np.lexsort((loss.round(9), -auc.round(9)))[0])


def _described(scores: Scores, place: int) -> str:
    return f"{scores.name}, {scores.chosen[place]}" if scores.chosen else scores.name


# --- measured on validation patients --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How well scores predict, in tables with the columns head, kind, split and seed first."""

    runs: pd.DataFrame  # one row per split: threshold, metrics, …
    predictions: pd.DataFrame  # one row per split and validation patient


def measure(
    patients: PlannedPatients,
    scores: Scores,
    *,
    calibration: str = "platt",
    threshold: str = PREVALENCE,
) -> Measured:
    """Measure in each split at its own threshold, learnt by a rule of `decision.RULES`.

    It is learnt on training patients, out of fold. Without inner splits it is learnt on their
    probabilities as fitted (see `Decision.of_fitted`), and nothing is calibrated. The threshold of
    `majority` is .5.
    """
    rule = HALF if scores.name == MAJORITY else threshold
    decisions = _learn_decisions(patients, scores, calibration, rule)
    calibrated = [
        decision.calibrate(scores.outer[place, rows])
        for place, (decision, rows) in enumerate(zip(decisions, patients.validation, strict=True))
    ]
    return Measured(
        runs=_measure_runs(patients, scores, decisions, calibrated),
        predictions=_list_predictions(patients, scores, decisions, calibrated),
    )


def _learn_decisions(
    patients: PlannedPatients, scores: Scores, method: str, rule: str
) -> list[Decision]:
    """Learn each split's threshold and calibration on its training patients."""
    nested = not np.isnan(scores.inner).all()
    known = scores.inner if nested else scores.fitted
    calibrations = [Calibration()] * len(known)
    if nested:
        calibrations = fit_calibrations(known, patients.labels, method)
    return [
        Decision(
            threshold=learn_threshold(
                rule, known[place, train], patients.labels[train], calibration
            ),
            calibration=calibration,
        )
        for place, (calibration, train) in enumerate(zip(calibrations, patients.train, strict=True))
    ]


def _measure_runs(
    patients: PlannedPatients,
    scores: Scores,
    decisions: Sequence[Decision],
    calibrated: Sequence[Floats],
) -> pd.DataFrame:
    runs = []
    for place, (split, rows) in enumerate(
        zip(patients.plan.outer, patients.validation, strict=True)
    ):
        labels, at = patients.labels[rows], decisions[place].threshold
        metrics = all_metrics(scores.outer[place, rows], labels, at)
        runs.append(
            {
                "head": scores.name,
                "kind": scores.kind,
                "split": split.id,
                "seed": split.seed,
                "threshold": at,
                **{name: float(value) for name, value in metrics.items()},
                "log_loss_calibrated": float(log_loss(calibrated[place], labels)),
                "brier_calibrated": float(brier_score(calibrated[place], labels)),
                "chosen": scores.chosen[place] if scores.chosen else "",
            }
        )
    return pd.DataFrame(runs)


def _list_predictions(
    patients: PlannedPatients,
    scores: Scores,
    decisions: Sequence[Decision],
    calibrated: Sequence[Floats],
) -> pd.DataFrame:
    splits = patients.plan.outer
    rows = np.concatenate(patients.validation)  # (n,) all validation patients, split after split
    place = np.repeat(np.arange(len(splits)), [len(rows) for rows in patients.validation])  # (n,)
    probability = scores.outer[place, rows]
    threshold = np.array([decision.threshold for decision in decisions])[place]
    return pd.DataFrame(
        {
            "head": scores.name,
            "kind": scores.kind,
            "split": np.array([split.id for split in splits])[place],
            "seed": np.array([split.seed for split in splits])[place],
            "patient": patients.ids[rows],
            "probability": probability,
            "calibrated": np.concatenate(calibrated),
            "threshold": threshold,
            "predicted": (probability > threshold).astype(int),
            "label": patients.labels[rows],
        }
    )


def measure_as_reported(
    patients: PlannedPatients, scores: Scores, curves: Sequence[Floats]
) -> Measured:
    """Measure at .5 as the report did, from each split's `curves` (E, n) over the epochs."""
    last = measure(patients, scores, calibration="none", threshold=HALF)
    runs = [
        run | report_run(probabilities, patients.labels[rows])
        for run, probabilities, rows in zip(
            last.runs.to_dict("records"), curves, patients.validation, strict=True
        )
    ]
    unused = ["log_loss_calibrated", "brier_calibrated", "chosen"]
    return Measured(
        runs=pd.DataFrame(runs).drop(columns=unused),
        predictions=last.predictions.drop(columns="calibrated"),
    )


def report_run(curves: Floats, labels: Labels) -> dict[str, object]:
    """Measure a run as the report did: curves (E, n) at .5, the mean of its ten best epochs.

    Also every metric at the last epoch, `…_last`; the mean of the ten lowest log losses; and
    balanced accuracy at the best of 100 thresholds chosen on these patients, labels (n,), `oracle`
    (METHOD §4).
    """
    metrics = all_metrics(curves, labels)
    best = np.argsort(-metrics["ba"], kind="stable")[:BEST_EPOCHS]
    oracle = np.sort(oracle_balanced_accuracy(curves, labels))[::-1][:BEST_EPOCHS]
    lowest = np.sort(metrics["log_loss"])[:BEST_EPOCHS]
    return {
        "threshold": 0.5,
        **{name: float(values[best].mean()) for name, values in metrics.items()},
        "log_loss_best": float(lowest.mean()),
        "ba_oracle": float(oracle.mean()),
        "ba_best_epochs": metrics["ba"][best].tolist(),
        **{f"{name}_last": float(values[-1]) for name, values in metrics.items()},
    }


_WITH_INTERVAL = ("ba", "auc")


def patient_metrics(
    patients: pd.DataFrame, threshold: ArrayLike, folds: NDArray[np.int64] | None = None
) -> dict[str, float | None]:
    """Measure predicted patients, all labelled; None where a class is missing.

    `patients` has the columns label and probability; `threshold` is one number or each patient's
    own (P,). BA and AUC have 95 % bootstrap intervals over patients, `ba_low`, `ba_high`, …. With
    `folds` (P,), predicted by different models, `auc` is within folds, and `auc_pooled` is that of
    all patients together.
    """
    labels = patients["label"].to_numpy(np.int64)
    probability = patients["probability"].to_numpy(np.float64)
    values = {k: float(v) for k, v in all_metrics(probability, labels, threshold).items()}
    if folds is not None:
        values["auc_pooled"] = values["auc"]
        values["auc"] = float(fold_auc(probability, labels, folds))
    intervals = bootstrap_metrics(probability, labels, threshold, folds)
    for name in _WITH_INTERVAL:
        low, high = intervals[name]
        # A draw from a posterior is never 1: an interval must still hold what it is of.
        values[f"{name}_low"] = min(low, values[name])
        values[f"{name}_high"] = max(high, values[name])
    return {"patients": len(patients)} | {
        name: value if math.isfinite(value) else None for name, value in values.items()
    }
