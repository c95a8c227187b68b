"""What stands beside every image model, on the same splits (METHOD §4).

An image model that doesn't beat bag size has learnt a shortcut; a fused one that doesn't beat the
clinical attributes is worth nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.attributes import attribute_matrix, choose_attributes, standardise
from lymphfeat.cohort import Cohort
from lymphfeat.evaluation import (
    BAG_SIZE,
    CLINICAL,
    MAJORITY,
    Floats,
    Labels,
    Learner,
    Patients,
    Predictor,
    Scores,
    cross_fit,
)
from lymphfeat.splits import Split


def fit_baselines(
    patients: Patients, n_images: NDArray[np.int64], attributes: Floats
) -> list[Scores]:
    """Fit majority, bag size, and (where there are any) the clinical attributes.

    n_images: (P,); attributes: (P, D), NaN where missing.
    """
    sizes = np.log(n_images.astype(float))[:, None]  # (P, 1)
    found = [
        _baseline(patients, MAJORITY, learn_majority, sizes),
        _baseline(patients, BAG_SIZE, learn_logistic, sizes),
    ]
    if attributes.shape[1]:
        found.append(_baseline(patients, CLINICAL, learn_logistic, attributes))
    return found


def predict_unseen(known: Cohort, splits: Sequence[Split]) -> dict[str, Floats]:
    """Predict each labelled patient by baselines fitted on a split's training patients.

    Returns probabilities (P,) by the baseline's name, in the cohort's order; NaN for patients whom
    no split holds out.
    """
    attributes = attribute_matrix(known.table, choose_attributes(known.table))
    sizes = np.log(known.n_images.astype(float))[:, None]  # (P, 1)
    ways = {MAJORITY: (learn_majority, sizes), BAG_SIZE: (learn_logistic, sizes)}
    if attributes.shape[1]:
        ways[CLINICAL] = (learn_logistic, attributes)
    place = {id: row for row, id in enumerate(known.ids)}
    found = {name: np.full(len(known.ids), np.nan) for name in ways}
    for split in splits:
        train, held_out = ([place[id] for id in ids] for ids in (split.train, split.validation))
        for name, (learn, inputs) in ways.items():
            predict = learn(inputs[train], known.labels[train])
            found[name][held_out] = predict(inputs[held_out])
    return found


def _baseline(patients: Patients, name: str, learner: Learner, inputs: Floats) -> Scores:
    outer, inner, fitted = cross_fit(patients, learner, lambda place: inputs)
    return Scores(name=name, kind="baseline", outer=outer, inner=inner, fitted=fitted)


def learn_majority(inputs: Floats, labels: Labels) -> Predictor:
    """Predict the share of tumoral training patients for everybody."""
    share = float(labels.mean())
    return lambda others: np.full(len(others), share)


def learn_logistic(inputs: Floats, labels: Labels) -> Predictor:
    """Fit a logistic regression (L2, C 1) on columns scaled over these patients alone.

    Newton's steps, as scikit-learn's newton-cholesky: a plan takes hundreds of these small fits.
    """
    rows = np.arange(len(inputs))
    weights = _newton_logistic(_with_ones(standardise(inputs, rows)), labels)

    def predict(others: Floats) -> Floats:
        scaled = standardise(np.concatenate([inputs, others]), rows)[len(inputs) :]
        probability: Floats = expit(_with_ones(scaled) @ weights)
        return probability

    return predict


def _with_ones(x: Floats) -> Floats:
    return np.column_stack([x, np.ones(len(x))])


def _newton_logistic(x: Floats, labels: Labels) -> Floats:
    """Minimise log loss + |w|² / 2, the last weight (the intercept) free: (D,)."""
    penalty = np.ones(x.shape[1])
    penalty[-1] = 0
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        p = expit(x @ weights)
        gradient = x.T @ (p - labels) + penalty * weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        weights -= step * min(1, 2 / max(np.abs(step).max(), 1e-12))  # no leaps
        if np.abs(step).max() < 1e-8:
            break
    return weights
