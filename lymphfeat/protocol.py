"""Protocols: which fits are made of heads and splits, and how their curves become figures.

- `report` (METHOD §4): halves of the patients, one a seed; threshold .5; the mean of each run's ten
  best epochs. Comparable with the published figures, and optimistic: the epochs are chosen on the
  patients they are measured on.
- `honest`: repeated stratified k-fold; the last epoch; the threshold chosen on out-of-fold
  probabilities of training patients alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.errors import LeakageError
from lymphfeat.heads import head_name
from lymphfeat.intervals import corrected_factor, t_half_width
from lymphfeat.metrics import (
    METRICS,
    all_metrics,
    choose_threshold,
    oracle_balanced_accuracy,
    roc_auc,
)
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat.splits import Plan, Split, check_splits, kfold_splits, report_splits
from lymphfeat.training import Features, Fit, FittedHeads, fit_heads

BEST_EPOCHS = 10  # of each run, averaged by the report (§4)
_NORMAL_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a protocol found."""

    heads: tuple[HeadSettings, ...]
    splits: tuple[Split, ...]  # the evaluated ones
    epochs: pd.DataFrame  # tidy: head, split, seed, epoch, loss, metrics at threshold .5
    predictions: (
        pd.DataFrame
    )  # patient, head, split, seed, probability, threshold, predicted, label
    runs: pd.DataFrame  # head, split, metrics of the run
    summary: pd.DataFrame  # one row a head, the best first
    fitted: FittedHeads  # heads x splits, in that order


def run_protocol(
    features: Features,
    ids: Sequence[str],
    labels: NDArray[np.int64],
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    *,
    splits: Sequence[Split] | None = None,
    trained_on: Sequence[str] = (),
    progress: Progress = silent,
) -> Outcome:
    """Fit every head on every split of the protocol and measure it.

    `ids` and `labels` (P,) are all patients of `features`; those of label -1 are left out. `splits`
    are taken in place of the protocol's own. `trained_on` names the patients whose labels the
    backbone has seen: LeakageError where one of them would be evaluated.
    """
    plan = make_plan(ids, labels, settings, splits)
    refuse_leakage(plan.outer, trained_on)
    outer = [Fit(head=head, split=split) for head in heads for split in plan.outer]
    inner = [
        Fit(head=head, split=split, curve=False) for head in heads for split in plan.inner_once
    ]
    fitted = fit_heads(
        features,
        outer + inner,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        images_per_patient=settings.images_per_patient,
        views=features.n_views,
        tta=settings.tta,
        progress=progress,
    )
    thresholds = _thresholds(features, fitted, len(heads), plan, labels)
    evaluation = _Evaluation(features, fitted.take(range(len(outer))), labels, thresholds, ids)
    epochs = evaluation.epochs()
    runs = evaluation.report_runs() if settings.protocol == "report" else evaluation.last_runs()
    return Outcome(
        heads=tuple(heads),
        splits=plan.outer,
        epochs=epochs,
        predictions=evaluation.predictions(),
        runs=runs,
        summary=_summarise(runs, plan),
        fitted=evaluation.fitted,
    )


def make_plan(
    ids: Sequence[str],
    labels: NDArray[np.int64],
    settings: FitSettings,
    splits: Sequence[Split] | None = None,
) -> Plan:
    """Return the splits of a protocol, or the given ones, with the inner ones it chooses on."""
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    known = [patient for patient in ids if label_of[patient] >= 0]
    truth = labels[labels >= 0]
    if splits is not None:
        check_splits(splits, label_of, "splits")
    elif settings.protocol == "report":
        splits = report_splits(known, truth, seeds=settings.seeds, seed=settings.seed)
    else:
        repeats = kfold_splits(
            known, truth, folds=settings.folds, seeds=settings.seeds, seed=settings.seed
        )
        splits = [split for repeat in repeats for split in repeat.outer]
    if settings.protocol == "report":
        return Plan.flat(splits)
    return Plan.nested(splits, label_of, folds=settings.folds)


def refuse_leakage(splits: Sequence[Split], trained_on: Sequence[str]) -> None:
    """Raise LeakageError when a validation patient is one the backbone was fine-tuned on."""
    seen = set(trained_on)
    leaked = sorted({patient for split in splits for patient in split.validation} & seen)
    if leaked:
        shown = ", ".join(leaked[:10]) + (f", … ({len(leaked)} in all)" if len(leaked) > 10 else "")
        raise LeakageError(
            f"the backbone of these features was fine-tuned on {shown}: heads must not be "
            "evaluated on them. Extract with per-split fine-tuning, or with frozen weights."
        )


def _thresholds(
    features: Features,
    fitted: FittedHeads,
    n_heads: int,
    plan: Plan,
    labels: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Choose each outer fit's threshold on training patients: (heads · splits,); else .5."""
    position = {(fit.head, fit.split.id): i for i, fit in enumerate(fitted.fits)}
    thresholds = np.full(n_heads * len(plan.outer), 0.5)
    for i, fit in enumerate(fitted.fits[: len(thresholds)]):
        inner = plan.inner[i % len(plan.outer)]
        train = set(fit.split.train)
        probabilities, truth = [], []
        for split in inner:
            rows = features.rows_of([patient for patient in split.validation if patient in train])
            probabilities.append(fitted.curves[position[fit.head, split.id], -1, rows])
            truth.append(labels[rows])
        if inner:
            thresholds[i] = choose_threshold(
                np.concatenate(probabilities).astype(np.float64), np.concatenate(truth)
            )
    return thresholds


class _Evaluation:
    """Turns curves of fits into tables."""

    def __init__(
        self,
        features: Features,
        fitted: FittedHeads,
        labels: NDArray[np.int64],
        thresholds: NDArray[np.float64],
        ids: Sequence[str],
    ) -> None:
        self.fitted = fitted
        self._labels, self._thresholds, self._ids = labels, thresholds, np.array(ids)
        self._rows = {fit.split.id: features.rows_of(fit.split.validation) for fit in fitted.fits}

    def _of(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return fit i's validation curves (E, P) and labels (P,)."""
        rows = self._rows[self.fitted.fits[i].split.id]
        return self.fitted.curves[i][:, rows].astype(np.float64), self._labels[rows]

    def _frame(self, i: int, columns: dict[str, object]) -> pd.DataFrame:
        fit = self.fitted.fits[i]
        return pd.DataFrame(
            {"head": head_name(fit.head), "split": fit.split.id, "seed": fit.split.seed, **columns}
        )

    def epochs(self) -> pd.DataFrame:
        n_epochs = self.fitted.losses.shape[1]
        frames = [
            self._frame(
                i,
                {
                    "epoch": np.arange(1, n_epochs + 1),
                    "loss": self.fitted.losses[i],
                    **all_metrics(*self._of(i)),
                },
            )
            for i in range(len(self.fitted.fits))
        ]
        return pd.concat(frames, ignore_index=True)

    def predictions(self) -> pd.DataFrame:
        frames = []
        for i, fit in enumerate(self.fitted.fits):
            curves, labels = self._of(i)
            frames.append(
                self._frame(
                    i,
                    {
                        "patient": self._ids[self._rows[fit.split.id]],
                        "probability": curves[-1],
                        "threshold": self._thresholds[i],
                        "predicted": (curves[-1] > self._thresholds[i]).astype(int),
                        "label": labels,
                    },
                )
            )
        return pd.concat(frames, ignore_index=True)

    def last_runs(self) -> pd.DataFrame:
        """Measure every fit at its last epoch and its own threshold."""
        frames = [
            self._frame(
                i,
                {
                    "threshold": [self._thresholds[i]],
                    **_first_row(all_metrics(curves[-1:], labels, self._thresholds[i : i + 1])),
                },
            )
            for i, (curves, labels) in enumerate(map(self._of, range(len(self.fitted.fits))))
        ]
        return pd.concat(frames, ignore_index=True)

    def report_runs(self) -> pd.DataFrame:
        """Average every fit's ten best epochs at .5 (report §4), and at the oracle threshold."""
        frames = []
        for i in range(len(self.fitted.fits)):
            curves, labels = self._of(i)
            metrics = all_metrics(curves, labels)
            best = np.argsort(-metrics["ba"], kind="stable")[:BEST_EPOCHS]
            oracle = np.sort(oracle_balanced_accuracy(curves, labels))[::-1][:BEST_EPOCHS]
            frames.append(
                self._frame(
                    i,
                    {
                        "threshold": [0.5],
                        **{name: [values[best].mean()] for name, values in metrics.items()},
                        "ba_oracle": [oracle.mean()],
                        "ba_best_epochs": [metrics["ba"][best].tolist()],
                        "ba_last": [metrics["ba"][-1]],
                    },
                )
            )
        return pd.concat(frames, ignore_index=True)


def _first_row(metrics: dict[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {name: [float(values[0])] for name, values in metrics.items()}


def _summarise(runs: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    rows = []
    for head, group in runs.groupby("head", sort=False):
        row: dict[str, object] = {"head": head, "runs": len(group)}
        row |= {name: float(group[name].mean()) for name in METRICS}
        row |= _report_intervals(group) if "ba_oracle" in group else _honest_interval(group, plan)
        rows.append(row)
    return pd.DataFrame(rows).sort_values("ba", ascending=False, ignore_index=True)


def _report_intervals(group: pd.DataFrame) -> dict[str, float]:
    values = np.concatenate(group["ba_best_epochs"].tolist())
    published = _NORMAL_95 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
    return {
        "ba_half_width": t_half_width(group["ba"].to_numpy()),
        # As published: a run's ten epochs taken as independent (METHOD §4), so far too narrow.
        "ba_half_width_published": float(published),
        "ba_oracle": float(group["ba_oracle"].mean()),
        "ba_last": float(group["ba_last"].mean()),
    }


def _honest_interval(group: pd.DataFrame, plan: Plan) -> dict[str, float]:
    factor = corrected_factor(len(group), plan.test_to_train)
    return {"ba_half_width": t_half_width(group["ba"].to_numpy(), factor)}


def witness_aucs(
    outcome: Outcome,
    features: Features,
    patient_of_image: NDArray[np.int64],
    witness: NDArray[np.bool_],
) -> pd.Series:
    """Return for each head how well its image logits find the witnesses, mean over splits.

    `patient_of_image` and `witness` are (N,). Measured on the validation patients who have a
    witness: AUC of their witness images against their other images.
    """
    images = features.images.float().cpu().numpy()  # (N, C)
    values: dict[str, list[float]] = {}
    for i, fit in enumerate(outcome.fitted.fits):
        rows = features.rows_of(fit.split.validation)
        carriers = np.intersect1d(rows, np.unique(patient_of_image[witness]))
        chosen = np.isin(patient_of_image, carriers)
        logits = images[chosen] @ outcome.fitted.weight[i]
        auc = roc_auc(logits[None].astype(np.float64), witness[chosen].astype(np.int64))[0]
        values.setdefault(head_name(fit.head), []).append(float(auc))
    return pd.Series({head: float(np.nanmean(aucs)) for head, aucs in values.items()})
