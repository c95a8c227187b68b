"""Baselines that every image model is compared with, on the same splits (METHOD §4).

An image model that doesn't beat bag size may have learnt only a shortcut; a fused one that doesn't
beat the clinical attributes adds nothing to them.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.attributes import AttributeRecipe
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split
from lymphfeat.evaluation.decision import HALF, cross_fit_decisions
from lymphfeat.evaluation.intervals import bootstrap_auc_gain
from lymphfeat.evaluation.regression import learn_logistic
from lymphfeat.evaluation.scores import (
    BAG_SIZE,
    CLINICAL,
    MAJORITY,
    Learner,
    PlannedPatients,
    PredictFunction,
    Scores,
    cross_fit,
    patient_metrics,
)
from lymphfeat.runtime.arrays import Floats, Labels


def fit_baselines(
    patients: PlannedPatients, n_images: NDArray[np.int64], attributes: Floats
) -> list[Scores]:
    """Fit majority, bag size and, unless D is 0, the clinical attributes.

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


def predict_unseen(
    known: Cohort, splits: Sequence[Split], recipe: AttributeRecipe
) -> dict[str, Floats]:
    """Predict the patients that each split holds out, by baselines fitted on its training patients.

    `recipe` says how their clinical attributes are read. Returns probabilities (P,) by the
    baseline's name, in the order of `known`, a cohort of labelled patients; NaN for patients that
    no split holds out.
    """
    attributes = recipe.matrix(known.table)  # (P, D)
    sizes = np.log(known.n_images.astype(float))[:, None]  # (P, 1)
    ways: dict[str, tuple[Learner, Floats]] = {
        MAJORITY: (learn_majority, sizes),
        BAG_SIZE: (learn_logistic, sizes),
    }
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


def _baseline(patients: PlannedPatients, name: str, learner: Learner, inputs: Floats) -> Scores:
    return cross_fit(patients, learner, lambda place: inputs, name=name, kind="baseline")


def learn_majority(inputs: Floats, labels: Labels) -> PredictFunction:
    """Predict the share of tumoral training patients for every patient."""
    share = float(labels.mean())
    return lambda others: np.full(len(others), share)


Metrics = dict[str, float | None]


def folds_of(ids: Sequence[str], splits: Sequence[Split]) -> NDArray[np.int64]:
    """Return the place of the split that holds each patient out: (P,)."""
    place = {id: fold for fold, split in enumerate(splits) for id in split.validation}
    return np.array([place[id] for id in ids], np.int64)


def measure_baselines(
    unseen: pd.DataFrame,
    known: Cohort,
    splits: Sequence[Split],
    *,
    rule: str,
    recipe: AttributeRecipe,
) -> dict[str, Metrics]:
    """Measure majority, bag size and clinical attributes on the patients of `unseen`.

    unseen: columns id, label and probability, predicted by models not trained on the patient, as
    `splits` record. Thresholds follow the models' `rule`; with several splits each fold's comes
    from the probabilities of the others. Besides the metrics there is `auc_gain`: by how much the
    AUC of `unseen` is larger, with its 95 % bootstrap interval over patients. With several splits
    both AUCs are within folds.
    """
    rows = pd.Index(known.ids).get_indexer(pd.Index(unseen["id"]))  # (P,) of the cohort
    folds = folds_of(unseen["id"].tolist(), splits) if len(splits) > 1 else None
    probability = unseen["probability"].to_numpy(np.float64)
    labels = unseen["label"].to_numpy(np.int64)
    measured: dict[str, Metrics] = {}
    for name, values in predict_unseen(known, splits, recipe).items():
        found = values[rows]
        if name == MAJORITY or rule == HALF:
            at: float | Floats = 0.5
        elif folds is None:
            at = _share(known, splits[0])
        else:
            at = cross_fit_decisions(found, labels, folds, rule=rule, method="none").threshold
        gain = bootstrap_auc_gain(probability, found, labels, folds)
        named = zip(("auc_gain", "auc_gain_low", "auc_gain_high"), gain, strict=True)
        table = unseen.assign(probability=found)
        measured[f"baseline: {name}"] = {**patient_metrics(table, at, folds), **dict(named)}
    return measured


def _share(known: Cohort, split: Split) -> float:
    """Return the share of tumoral training patients, the mean of a baseline's probabilities."""
    return float(known.select(split.train).labels.mean())
