"""Probabilities under a plan of splits -> runs, predictions and a summary (METHOD §4).

Whatever is measured (a head, a fusion, a baseline) is a `Scores`. What is chosen for a split (the
threshold, the calibration, one of several heads) is chosen on its training patients' out-of-fold
probabilities, and measured on its validation patients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lymphfeat.cohort.splits import Plan, Split
from lymphfeat.evaluation.calibration import calibration_error, fit_calibrations
from lymphfeat.evaluation.decision import (
    HALF,
    PREVALENCE,
    learn_threshold,
)
from lymphfeat.evaluation.intervals import (
    Estimate,
    bootstrap_metrics,
    estimate,
    estimate_metric,
    t_half_width,
)
from lymphfeat.evaluation.metrics import (
    METRICS,
    all_metrics,
    brier_score,
    fold_auc,
    log_loss,
    metric_bounds,
    oracle_balanced_accuracy,
    roc_auc,
)
from lymphfeat.runtime.arrays import Floats, Labels

PredictFunction = Callable[[Floats], Floats]  # inputs (m, D) -> probabilities (m,)
Learner = Callable[[Floats, Labels], PredictFunction]  # of training patients, (n, D) and (n,)

BEST_EPOCHS = 10  # of each run, averaged by the report (§4)
KINDS = ("head", "fusion", "selected", "baseline")
MAJORITY, BAG_SIZE, CLINICAL = "majority", "bag size", "clinical"
_NORMAL_95 = 1.96
_KEPT = ("threshold", *METRICS, "log_loss_calibrated", "brier_calibrated")


class PlannedPatients:
    """The patients of a plan: their labels, and their rows on each side of each split."""

    def __init__(self, ids: Sequence[str], labels: Labels, plan: Plan) -> None:
        self.ids, self.labels, self.plan = np.array(ids), labels, plan
        self._row = {patient: row for row, patient in enumerate(ids)}
        self.train = [self.rows(split.train) for split in plan.outer]
        self.validation = [self.rows(split.validation) for split in plan.outer]

    def rows(self, patients: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of patients by their ids."""
        return np.array([self._row[patient] for patient in patients], dtype=np.int64)

    def inner(self, place: int) -> list[tuple[Split, NDArray[np.int64]]]:
        """Return an outer split's inner splits, and the rows that each may speak of."""
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
    """What one thing says of every split's patients, (S, P) each; NaN of those it may not judge."""

    name: str
    kind: str  # one of KINDS
    outer: Floats  # of validation patients, learnt from all training patients
    inner: Floats  # of training patients, out of fold; NaN throughout without inner splits
    fitted: Floats  # of training patients, as they were fitted
    # Per split, what was chosen on its training patients: an epoch, a head.
    chosen: tuple[str, ...] = ()


def cross_fit(
    patients: PlannedPatients, learner: Learner, inputs: Callable[[int], Floats]
) -> tuple[Floats, Floats, Floats]:
    """Fit a learner on every split's training patients, and out of fold inside them.

    `inputs` gives an outer split's (P, D). Returns outer, inner and fitted of a `Scores`.
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
    return outer, inner, fitted


def select_inside(patients: PlannedPatients, candidates: Sequence[Scores], name: str) -> Scores:
    """For each split take the candidate that is best on its training patients, out of fold.

    Best is the highest AUC, of equals the lowest log loss, of those the first: nested selection.
    """
    best = []
    for place, train in enumerate(patients.train):
        stacked = np.stack([scores.inner[place, train] for scores in candidates])  # (H, n)
        labels = patients.labels[train]
        auc, loss = roc_auc(stacked, labels), log_loss(stacked, labels)
        best.append(int(np.lexsort((loss.round(9), -auc.round(9)))[0]))
    return Scores(
        name=name,
        kind="selected",
        outer=np.stack([candidates[b].outer[place] for place, b in enumerate(best)]),
        inner=np.stack([candidates[b].inner[place] for place, b in enumerate(best)]),
        fitted=np.stack([candidates[b].fitted[place] for place, b in enumerate(best)]),
        chosen=tuple(_described(candidates[b], place) for place, b in enumerate(best)),
    )


def _described(scores: Scores, place: int) -> str:
    return f"{scores.name}, {scores.chosen[place]}" if scores.chosen else scores.name


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One thing measured on every split."""

    runs: pd.DataFrame  # a row a split
    predictions: pd.DataFrame  # a row a split and validation patient


def measure(
    patients: PlannedPatients,
    scores: Scores,
    *,
    calibration: str = "platt",
    threshold: str = PREVALENCE,
) -> Measured:
    """Measure at each split's own threshold, learnt by a rule of `decision.RULES`.

    It is learnt on training patients, out of fold; without inner splits, on their probabilities as
    fitted (see `Decision.of_fitted`), and nothing is calibrated. `majority` is decided at .5.
    """
    rule = HALF if scores.name == MAJORITY else threshold
    nested = not np.isnan(scores.inner).all()
    calibrations = fit_calibrations(
        scores.inner if nested else np.full_like(scores.inner, 0.5),
        patients.labels,
        calibration if nested else "none",
    )
    runs, predictions = [], []
    for place, split in enumerate(patients.plan.outer):
        train, rows = patients.train[place], patients.validation[place]
        labels, probability = patients.labels[rows], scores.outer[place, rows]
        at = learn_threshold(
            rule,
            (scores.inner if nested else scores.fitted)[place, train],
            patients.labels[train],
            calibrations[place],
        )
        calibrated = calibrations[place].apply(probability)
        run = _identify(scores, split) | {"threshold": at}
        run |= {n: float(v) for n, v in all_metrics(probability, labels, at).items()}
        run["log_loss_calibrated"] = float(log_loss(calibrated, labels))
        run["brier_calibrated"] = float(brier_score(calibrated, labels))
        run["chosen"] = scores.chosen[place] if scores.chosen else ""
        runs.append(run)
        predictions.append(
            {
                "split": [split.id] * len(rows),
                "seed": [split.seed] * len(rows),
                "patient": patients.ids[rows],
                "probability": probability,
                "calibrated": calibrated,
                "threshold": np.full(len(rows), at),
                "predicted": (probability > at).astype(int),
                "label": labels,
            }
        )
    told = {name: np.concatenate([part[name] for part in predictions]) for name in predictions[0]}
    return Measured(
        runs=pd.DataFrame(runs),
        predictions=pd.DataFrame({"head": scores.name, "kind": scores.kind, **told}),
    )


def _identify(scores: Scores, split: Split) -> dict[str, object]:
    return {"head": scores.name, "kind": scores.kind, "split": split.id, "seed": split.seed}


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
    """Measure a run as the report did: curves (E, P) at .5, the mean of its ten best epochs.

    Beside it every metric at the last epoch, `…_last`; the mean of the ten lowest log losses; and
    the best of 100 thresholds, chosen on these patients (METHOD §4, `oracle`).
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


def summarise(runs: pd.DataFrame, predictions: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Return a row for each name: means over splits, intervals; the best first, baselines last.

    Beside a metric m is its corrected 95 % interval, `m_low` and `m_high`, cut off at the metric's
    bounds; of balanced accuracy and AUC also half of it before the cut, `m_half_width`.
    """
    label_of = predictions.drop_duplicates("patient")["label"]
    rarer = int(label_of.value_counts().min())
    errors = _calibration_errors(predictions, plan)
    rows = []
    for (head, kind), group in runs.groupby(["head", "kind"], sort=False):
        row: dict[str, object] = {"head": head, "kind": kind, "runs": len(group)}
        row |= {name: float(group[name].mean()) for name in _KEPT if name in group}
        row |= errors.get(str(head), {})
        for name in METRICS:
            found = _estimate(group[name], name, plan, rarer)
            row |= _ends(name, found)
            if name in ("ba", "auc"):
                row[f"{name}_half_width"] = found.half_width
        if "ba_oracle" in group:
            row |= _as_published(group, plan, rarer)
        rows.append(row)
    table = pd.DataFrame(rows)
    last = table["kind"] == "baseline"
    return pd.concat(
        [table[~last].sort_values("ba", ascending=False, kind="stable"), table[last]],
        ignore_index=True,
    )


def _calibration_errors(predictions: pd.DataFrame, plan: Plan) -> dict[str, dict[str, float]]:
    """Measure calibration over all patients of a repeat: those of a fold are too few for bins."""
    repeat = predictions["split"].map({split.id: split.repeat for split in plan.outer})
    found: dict[str, dict[str, list[float]]] = {}
    for (head, _), group in predictions.groupby(["head", repeat.rename("repeat")], sort=False):
        errors = found.setdefault(str(head), {"ece": [], "ece_calibrated": []})
        labels = group["label"].to_numpy(np.int64)
        errors["ece"].append(calibration_error(group["probability"].to_numpy(float), labels))
        if "calibrated" in group:
            calibrated = group["calibrated"].to_numpy(float)
            errors["ece_calibrated"].append(calibration_error(calibrated, labels))
    return {
        head: {name: float(np.mean(values)) for name, values in errors.items() if values}
        for head, errors in found.items()
    }


def _estimate(values: pd.Series, metric: str, plan: Plan, rarer: int) -> Estimate:
    return estimate_metric(values.to_numpy(float), plan.test_to_train, metric_bounds(metric), rarer)


def _ends(name: str, found: Estimate) -> dict[str, float]:
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _as_published(group: pd.DataFrame, plan: Plan, rarer: int) -> dict[str, float]:
    """Return what only the report's protocol has, and the intervals of its kind.

    Those are too narrow: `ba_half_width_uncorrected` takes the runs, whose patients overlap, as
    independent; `ba_half_width_published` a run's ten epochs, too (METHOD §4).
    """
    epochs = np.concatenate(group["ba_best_epochs"].tolist())
    published = (
        _NORMAL_95 * epochs.std(ddof=1) / np.sqrt(len(epochs)) if len(epochs) > 1 else np.nan
    )
    return {
        "ba_half_width_uncorrected": t_half_width(group["ba"].to_numpy(float)),
        "ba_half_width_published": float(published),
        "ba_oracle": float(group["ba_oracle"].mean()),
        **_ends("ba_oracle", _estimate(group["ba_oracle"], "ba", plan, rarer)),
        "ba_last": float(group["ba_last"].mean()),
        "auc_last": float(group["auc_last"].mean()),
        "log_loss_best": float(group["log_loss_best"].mean()),
        **_ends("log_loss_best", _estimate(group["log_loss_best"], "log_loss", plan, rarer)),
    }


def find_warnings(runs: pd.DataFrame, plan: Plan) -> tuple[str, ...]:
    """List image rows that do not beat bag size and fused rows that do not beat clinical.

    A row beats a baseline when the corrected 95 % interval of their difference in AUC, paired by
    split, lies above 0. Under `report` heads are taken at their last epoch: a baseline has one
    epoch only, and the best of many would beat it by being chosen. A single split gives no
    interval, and the sentence says that nothing follows from it.
    """
    metric = "auc_last" if "auc_last" in runs else "auc"
    auc = runs.pivot(index="split", columns="head", values=metric)
    kinds = runs.drop_duplicates("head").set_index("head")["kind"]
    told = []
    for baseline, wanted, verdict in (
        (
            BAG_SIZE,
            ("head", "selected"),
            "it may have learnt only the number of images per patient",
        ),
        (CLINICAL, ("fusion",), "the images add nothing to the clinical attributes here"),
    ):
        if baseline not in auc:
            continue
        gains = {
            str(name): estimate((auc[name] - auc[baseline]).to_numpy(float), plan.test_to_train)
            for name in kinds.index[kinds.isin(wanted)]
        }
        worse = [name for name, gain in gains.items() if gain.low <= 0]
        unknown = [name for name, gain in gains.items() if np.isnan(gain.low)]
        if worse:
            at = ", heads at their last epoch" if metric == "auc_last" else ""
            told.append(
                f"{_listed(worse)}: {'does' if len(worse) == 1 else 'do'} not beat {baseline} "
                f"alone (AUC {auc[baseline].mean():.2f}{at}); {verdict}."
            )
        if unknown:
            reason = (
                "a single split gives no interval. Use more --seeds"
                if len(auc) == 1
                else "AUC is undefined in some splits"
            )
            told.append(
                f"{_listed(unknown)}: not compared with {baseline} alone, because {reason}."
            )
    return tuple(told)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


_WITH_INTERVAL = ("ba", "auc")


def patient_metrics(
    patients: pd.DataFrame, threshold: ArrayLike, folds: NDArray[np.int64] | None = None
) -> dict[str, float | None]:
    """Measure predicted patients, all labelled; None where a class is missing.

    `threshold` is one number or each patient's own. Beside BA and AUC stand their 95 % bootstrap
    intervals over patients, as `ba_low`, `ba_high`, …. With `folds` (P,), of different models, the
    AUC is that within folds, and `auc_pooled` that of all patients together.
    """
    labels = patients["label"].to_numpy(np.int64)
    probability = patients["probability"].to_numpy(np.float64)
    values = {k: float(v) for k, v in all_metrics(probability, labels, threshold).items()}
    if folds is not None:
        values["auc_pooled"] = values["auc"]
        values["auc"] = float(fold_auc(probability, labels, folds))
    intervals = bootstrap_metrics(probability, labels, threshold, folds)
    for name in _WITH_INTERVAL:
        values[f"{name}_low"], values[f"{name}_high"] = intervals[name]
    return {"patients": len(patients)} | {
        name: value if math.isfinite(value) else None for name, value in values.items()
    }
