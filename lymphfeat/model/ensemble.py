"""Several models as one: the mean of their calibrated logits."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lymphfeat.evaluation.decision import Decision, average, combine
from lymphfeat.model.predictions import SEEN, Predictions, decided_columns


def average_predictions(
    members: Sequence[Predictions], decisions: Sequence[Decision]
) -> Predictions:
    """Average the predictions of several models on one cohort, and decide with `combine`.

    The probability is the logistic of the mean of their calibrated logits.
    """
    raw = np.stack([member.patients["probability"].to_numpy(np.float64) for member in members])
    probability = average(decisions, raw)  # (M, P) -> (P,)
    calibrated = [decision.calibrate(p) for decision, p in zip(decisions, raw, strict=True)]
    patients = members[0].patients.assign(
        probability=probability,
        **decided_columns(probability, combine(decisions)),
        spread=np.std(calibrated, axis=0),
        seen=_most_seen([member.patients["seen"] for member in members]),
    )
    images = members[0].images.copy()
    for name in ("logit", "probability", "weight"):
        images[name] = np.mean([member.images[name] for member in members], axis=0)
    return Predictions(patients=patients, images=images)


def _most_seen(columns: Sequence["pd.Series[str]"]) -> list[str]:
    """Return what the members have jointly seen of each patient."""
    return [min(seen, key=SEEN.index) for seen in zip(*columns, strict=True)]
