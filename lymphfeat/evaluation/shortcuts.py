"""Attributes that predict the label without any cell: bag size, covariates, file formats."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from lymphfeat.cohort.cell_values import UNKNOWN
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.evaluation.intervals import faultless_low
from lymphfeat.runtime.arrays import Labels

Role = Literal["bag size", "covariate", "missing", "storage"]
Z_95 = 1.959964
ALMOST_THE_LABEL = 0.95  # an AUC surely above this may be the label in disguise


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How well one attribute alone separates tumoral from reactive labelled patients.

    `auc` does not depend on orientation: it is in [0.5, 1]. `low` and `high` are its 95 % interval
    after DeLong et al. 1988 (NaN with one patient in a class). A categorical attribute is measured
    by its best category: whether the patient belongs to `category` or not.
    """

    name: str
    role: Role
    category: str | None
    patients: int  # labelled, with a value
    auc: float
    low: float
    high: float
    tumoral_is: str  # "higher" or "lower"; with a category "in" or "not in" it

    @property
    def finding(self) -> str | None:
        """Return one line if this is a leak or a shortcut; clinical attributes may well predict."""
        auc = f"(AUC {self.auc:.2f}, 95 % interval {self.low:.2f} to {self.high:.2f})"
        if self.role != "covariate":
            line = f"shortcut: {self.name} alone predicts the label {auc}; a model may learn it"
            return line if self.low > 0.5 else None
        line = f"leak: {self.name} alone almost determines the label {auc}; is it known beforehand?"
        return line if self.low > ALMOST_THE_LABEL else None


def find_predictors(cohort: Cohort, storage: pd.DataFrame) -> tuple[Predictor, ...]:
    """Measure which attributes predict the labels without an image (METHOD §4, §6).

    storage: one row per patient, in the cohort's order: how the images are stored (format, size).
    Leaves out attributes with one value; returns nothing if a class is absent.
    """
    known = cohort.labels != UNKNOWN
    labels = cohort.labels[known]
    found = [
        _predict(name, role, column[known], labels)
        for name, role, column in _candidates(cohort, storage)
    ]
    return tuple(predictor for predictor in found if predictor is not None)


def delong_auc(scores: npt.NDArray[np.float64], labels: Labels) -> tuple[float, float]:
    """Return the ROC-AUC and its standard error after DeLong, DeLong & Clarke-Pearson 1988.

    scores: (P,), ties count one half. labels: (P,) of 0 and 1, both present. With one patient in a
    class the standard error is NaN.
    """
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    wins = _share_below(positive, negative)  # (positives,)
    losses = _share_below(negative, positive)  # (negatives,)
    auc = float(wins.mean())
    if min(len(wins), len(losses)) < 2:
        return auc, math.nan
    return auc, math.sqrt(wins.var(ddof=1) / len(wins) + losses.var(ddof=1) / len(losses))


def _share_below(
    values: npt.NDArray[np.float64], others: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return for each value the share of the sorted others below it, ties counted half."""
    below, upto = np.searchsorted(others, values, "left"), np.searchsorted(others, values, "right")
    share: npt.NDArray[np.float64] = (below + upto) / (2 * len(others))
    return share


def _candidates(
    cohort: Cohort, storage: pd.DataFrame
) -> Iterable[tuple[str, Role, "pd.Series[Any]"]]:
    yield "bag size", "bag size", pd.Series(cohort.n_images)
    for name in cohort.covariates:
        yield name, "covariate", cohort.table[name]
    for name in cohort.covariates:
        yield f"{name} given or not", "missing", cohort.table[name].isna().astype(float)
    for name in storage.columns:
        yield str(name), "storage", storage[name]


def _predict(name: str, role: Role, column: "pd.Series[Any]", labels: Labels) -> Predictor | None:
    """Measure one attribute (P,); None if it has one value only, or values in one class only."""
    given = column.notna().to_numpy()
    column, labels = column[given], labels[given]
    if column.nunique() < 2 or len(set(labels.tolist())) < 2:
        return None
    if pd.api.types.is_numeric_dtype(column):
        return _measure(name, role, None, column.to_numpy(dtype=float), labels)
    values = np.array(column.astype(str).tolist())
    tried = [
        _measure(name, role, value, (values == value).astype(float), labels)
        for value in sorted(set(values.tolist()))
    ]
    return max(tried, key=lambda predictor: (predictor.auc, predictor.tumoral_is == "in"))


def _measure(
    name: str,
    role: Role,
    category: str | None,
    scores: npt.NDArray[np.float64],
    labels: Labels,
) -> Predictor:
    auc, error = delong_auc(scores, labels)
    flipped = auc < 0.5
    auc = 1 - auc if flipped else auc
    low, high = auc - Z_95 * error, auc + Z_95 * error
    if auc == 1 and error == 0:
        # Without variance the standard error says nothing.
        low = faultless_low(int(np.bincount(labels).min()))
    words = ("higher", "lower") if category is None else ("in", "not in")
    return Predictor(
        name=name,
        role=role,
        category=category,
        patients=len(labels),
        auc=auc,
        low=max(0.0, low) if not math.isnan(low) else low,
        high=min(1.0, high) if not math.isnan(high) else high,
        tumoral_is=words[flipped],
    )
