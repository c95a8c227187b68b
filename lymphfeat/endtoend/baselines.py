"""What stands beside an end-to-end model on the patients it has not seen (METHOD §4)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.baselines import predict_unseen
from lymphfeat.cohort import Cohort
from lymphfeat.decision import HALF, cross_fit_decisions
from lymphfeat.evaluation import MAJORITY
from lymphfeat.intervals import bootstrap_auc_gain
from lymphfeat.model import patient_metrics
from lymphfeat.splits import Split

Metrics = dict[str, float | None]
Floats = NDArray[np.float64]


def folds_of(ids: Sequence[str], splits: Sequence[Split]) -> NDArray[np.int64]:
    """Return which of the splits holds each patient out: (P,)."""
    place = {id: fold for fold, split in enumerate(splits) for id in split.validation}
    return np.array([place[id] for id in ids], np.int64)


def measure_baselines(
    unseen: pd.DataFrame, known: Cohort, splits: Sequence[Split], *, rule: str
) -> dict[str, Metrics]:
    """Measure majority, bag size and clinical attributes on the patients of `unseen`.

    unseen: columns id, label and probability, by models that have not seen the patient; `splits`
    say who was trained on for whom. The rule of the models decides here, too: with several splits
    each fold by the probabilities of the others. Beside the metrics is `auc_gain`: by how much the
    AUC of `unseen` is larger, with its 95 % bootstrap interval over patients. With several splits
    both AUCs are within folds.
    """
    rows = pd.Index(known.ids).get_indexer(pd.Index(unseen["id"]))  # (P,) of the cohort
    folds = folds_of(unseen["id"].tolist(), splits) if len(splits) > 1 else None
    probability = unseen["probability"].to_numpy(np.float64)
    labels = unseen["label"].to_numpy(np.int64)
    measured: dict[str, Metrics] = {}
    for name, values in predict_unseen(known, splits).items():
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
    """Return the share of tumoral training patients: the mean of what a baseline makes of them."""
    return float(known.select(split.train).labels.mean())
