"""Metrics of patient probabilities against labels, for many heads at once (METHOD §4).

Probabilities are (..., P): the last axis is patients, the others are heads, epochs or anything
else. Labels are (P,), 0 or 1.
"""

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lymphfeat.runtime.arrays import Floats, Labels

ORACLE_THRESHOLDS: Floats = np.linspace(0, 0.99, 100)

# Thresholds below every probability and at the highest: finite, so that JSON holds them.
EVERYONE, NOBODY = -1e-9, 1.0


def sensitivity_specificity(
    probabilities: Floats, labels: Labels, threshold: ArrayLike = 0.5
) -> tuple[Floats, Floats]:
    """Return the shares of tumoral and of reactive patients that are called right: (...), (...).

    A patient is called tumoral when its probability is ABOVE the threshold (report §3.1), which is
    (...), or (..., P) if each patient has its own. Without patients of a class its share is NaN.
    """
    at = np.asarray(threshold)
    called = probabilities > (at if at.ndim == probabilities.ndim else at[..., None])
    with np.errstate(invalid="ignore"):
        sensitivity = (called & (labels == 1)).sum(-1) / np.float64((labels == 1).sum())
        specificity = (~called & (labels == 0)).sum(-1) / np.float64((labels == 0).sum())
    return sensitivity, specificity


def balanced_accuracy(probabilities: Floats, labels: Labels, threshold: ArrayLike = 0.5) -> Floats:
    """Return (sensitivity + specificity) / 2 (report §2.2): (...)."""
    sensitivity, specificity = sensitivity_specificity(probabilities, labels, threshold)
    return (sensitivity + specificity) / 2


def roc_auc(probabilities: Floats, labels: Labels) -> Floats:
    """Return the chance that a tumoral patient outranks a reactive one, ties half: (...).

    Patients of other labels are left out; NaN unless both classes are present.
    """
    positive = labels == 1
    n_positive, n_negative = positive.sum(), (labels == 0).sum()
    if not n_positive or not n_negative:
        return np.full(probabilities.shape[:-1], np.nan)
    ranks = _ranks(probabilities[..., (labels == 0) | positive])
    positive = positive[(labels == 0) | positive]
    surplus = ranks[..., positive].sum(-1) - n_positive * (n_positive + 1) / 2
    return np.asarray(surplus / (n_positive * n_negative))


def _ranks(values: Floats) -> Floats:
    """Return ranks from 1 on along the last axis; equals share their mean, one NaN makes all NaN.

    As `scipy.stats.rankdata`; pandas is imported anyway, and scipy.stats takes long to be.
    """
    rows = pd.DataFrame(values.reshape(-1, values.shape[-1]))
    ranks = rows.rank(axis=1).to_numpy().reshape(values.shape)
    return np.where(np.isnan(values).any(-1, keepdims=True), np.nan, ranks)


def fold_auc(
    probabilities: Floats,
    labels: Labels,
    folds: NDArray[np.int64],
    counts: Floats | None = None,
) -> Floats:
    """Return the chance that a tumoral patient outranks a reactive one OF THE SAME FOLD, ties half.

    `folds` (P,) are numbers of folds. This is the mean of the folds' AUCs, each weighted by its
    number of pairs, so it does not depend on how the scales of the folds' models differ. `counts`
    (..., P) is how often each patient is drawn (None: once), and gives (...). NaN if no fold has
    both classes.
    """
    counts = np.ones(len(labels)) if counts is None else counts
    tumoral, reactive = labels == 1, labels == 0
    above = probabilities[tumoral][:, None] - probabilities[reactive]  # (T, R)
    pairs = (folds[tumoral][:, None] == folds[reactive]).astype(float)
    won = pairs * (0.5 + 0.5 * np.sign(above))
    first, second = counts[..., tumoral], counts[..., reactive]
    with np.errstate(invalid="ignore"):
        return np.asarray(((first @ won) * second).sum(-1) / ((first @ pairs) * second).sum(-1))


def log_loss(probabilities: Floats, labels: Labels) -> Floats:
    """Return the mean negative log likelihood: (...); probabilities are clipped by 1e-7."""
    kept = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return np.asarray(-np.where(labels == 1, np.log(kept), np.log1p(-kept)).mean(-1))


def brier_score(probabilities: Floats, labels: Labels) -> Floats:
    """Return the mean squared distance to the label: (...)."""
    return np.asarray(((probabilities - labels) ** 2).mean(-1))


def choose_threshold(probabilities: Floats, labels: Labels) -> float:
    """Return the threshold with the best balanced accuracy; of several, the one nearest to .5.

    `probabilities` (P,) must be out of fold. Candidates are half-way between neighbours, and below
    the lowest probability, where every patient is called tumoral.
    """
    values = np.unique(probabilities)
    lowest = values[0] / 2 if values[0] > 0 else EVERYONE
    candidates = np.concatenate([[lowest], (values[:-1] + values[1:]) / 2])
    scores = balanced_accuracy(
        np.broadcast_to(probabilities, (len(candidates), len(probabilities))), labels, candidates
    )
    best = candidates[scores >= scores.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def oracle_balanced_accuracy(probabilities: Floats, labels: Labels) -> Floats:
    """Return the best balanced accuracy over 100 thresholds, chosen ON these patients: (...).

    Optimistic by construction; the report's top-k rows are computed like this (METHOD §4).
    """
    best = np.zeros(probabilities.shape[:-1])
    for threshold in ORACLE_THRESHOLDS:
        np.maximum(best, balanced_accuracy(probabilities, labels, threshold), out=best)
    return best


def all_metrics(
    probabilities: Floats, labels: Labels, threshold: ArrayLike = 0.5
) -> dict[str, Floats]:
    """Return every one of METRICS, each (...); see `sensitivity_specificity` for the threshold."""
    sensitivity, specificity = sensitivity_specificity(probabilities, labels, threshold)
    return {
        "ba": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "auc": roc_auc(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "brier": brier_score(probabilities, labels),
    }


METRICS = ("ba", "sensitivity", "specificity", "auc", "log_loss", "brier")


def metric_bounds(name: str) -> tuple[float, float]:
    """Return the smallest and the largest value of a metric: 0 and 1, but for the log loss."""
    return 0.0, math.inf if name == "log_loss" else 1.0
