"""What stands beside an end-to-end model on the patients it has not seen (METHOD §4)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lymphfeat.baselines import predict_unseen
from lymphfeat.cohort import Cohort
from lymphfeat.intervals import bootstrap_auc_gain
from lymphfeat.metrics import choose_threshold
from lymphfeat.model import patient_metrics
from lymphfeat.splits import Split

Metrics = dict[str, float | None]


def measure_baselines(
    unseen: pd.DataFrame, known: Cohort, splits: Sequence[Split], *, threshold: float | None
) -> dict[str, Metrics]:
    """Measure majority, bag size and clinical attributes on the patients of `unseen`.

    unseen: columns id, label and probability, by models that have not seen the patient; `splits`
    say who was trained on for whom. Without a `threshold` each baseline's is chosen, as the
    members' is, on these probabilities. Beside the metrics stands `auc_gain`: by how much the AUC
    of `unseen` is larger, with its 95 % bootstrap interval over patients.
    """
    rows = pd.Index(known.ids).get_indexer(pd.Index(unseen["id"]))  # (P,) of the cohort
    labels = unseen["label"].to_numpy(np.int64)
    measured: dict[str, Metrics] = {}
    for name, values in predict_unseen(known, splits).items():
        probability = values[rows]
        at = choose_threshold(probability, labels) if threshold is None else threshold
        table = unseen.assign(probability=probability)
        gain = bootstrap_auc_gain(unseen["probability"].to_numpy(np.float64), probability, labels)
        named = zip(("auc_gain", "auc_gain_low", "auc_gain_high"), gain, strict=True)
        measured[f"baseline: {name}"] = {**patient_metrics(table, at), **dict(named)}
    return measured
