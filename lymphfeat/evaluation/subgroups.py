"""How well a decision does in groups of patients: by their attributes and by their bag size."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lymphfeat.evaluation.intervals import bootstrap_metrics, wilson
from lymphfeat.evaluation.metrics import fold_auc, roc_auc
from lymphfeat.runtime.arrays import Floats, Labels

FEWEST = 5  # patients of a class, for a figure about it
MOST = 6  # groups of a column of categories; the most frequent
_FEW = 3  # different numbers that are categories, not to be cut at their median
ALL = "all patients"


def measure_subgroups(
    table: pd.DataFrame,
    probabilities: Floats,
    labels: Labels,
    threshold: ArrayLike = 0.5,
    folds: NDArray[np.int64] | None = None,
) -> pd.DataFrame:
    """Measure groups of patients by each column of their table, after all of them together.

    table: (P, columns), categories or numbers; `probabilities` and `labels` (0 or 1) are (P,), the
    threshold is one number or each patient's own. With `folds` (P,) the AUC is `fold_auc`.

    Returns one row per group: by (the column), group, reactive and tumoral (their numbers), and
    auc, sensitivity and specificity with the ends of their 95 % intervals (…_low, …_high): Wilson's
    of shares, the bootstrap's of the AUC. A share is missing if it is one of fewer than five
    patients, an AUC if either class has fewer. None of this is corrected for the number of groups.

    >>> measure_subgroups(cohort.table[["gender", "age"]], probabilities, labels, 0.5)
    """
    at = np.broadcast_to(np.asarray(threshold, np.float64), labels.shape)
    rows = []
    for by, group, own in groups_of(table):
        fold = None if folds is None else folds[own]
        figures = measure_group(probabilities[own], labels[own], at[own], fold)
        rows.append({"by": by, "group": group, **figures})
    return pd.DataFrame(rows)


def groups_of(table: pd.DataFrame) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield (column, group, whether each patient is in it): (P,) of all, and of every column.

    Numbers are cut at their median; categories are the most frequent ones. A column in which all
    patients are alike is left out; missing values are a group of their own.
    """
    yield ALL, "", np.ones(len(table), bool)
    for name, column in table.items():
        missing = column.isna().to_numpy(bool)
        groups = [(group, own) for group, own in (*_cut(column), ("missing", missing)) if own.any()]
        if len(groups) > 1:
            yield from ((str(name), group, own) for group, own in groups)


def _cut(column: "pd.Series[float]") -> Iterator[tuple[str, NDArray[np.bool_]]]:
    if not pd.api.types.is_numeric_dtype(column) or column.nunique() <= _FEW:
        for value in sorted(column.value_counts().index[:MOST], key=str):
            told = f"{value:g}" if isinstance(value, float) else str(value)
            yield told, (column == value).to_numpy(bool, na_value=False)
        return
    middle = float(column.median())
    told, below = shown(middle), (column < middle).to_numpy(bool, na_value=False)
    digits = 3
    while ((column < float(told)).to_numpy(bool, na_value=False) != below).any():
        digits += 1  # rounded so, a group would not hold whom its name says
        told = f"{middle:.{digits}g}"
    yield f"below {told}", below
    yield f"{told} or more", ~below & column.notna().to_numpy(bool)


def shown(value: float) -> str:
    """Show three digits of a number, but a year or an amount whole."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def measure_group(
    probabilities: Floats, labels: Labels, threshold: Floats, folds: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Measure one group of patients, all arguments (n,); see `measure_subgroups`."""
    called = probabilities > threshold
    tumoral, reactive = labels == 1, labels == 0
    return {
        "reactive": int(reactive.sum()),
        "tumoral": int(tumoral.sum()),
        **_auc(probabilities, labels, threshold, folds),
        **_share("sensitivity", called[tumoral]),
        **_share("specificity", ~called[reactive]),
    }


def _share(name: str, right: NDArray[np.bool_]) -> dict[str, float]:
    if len(right) < FEWEST:
        return _named(name, math.nan, math.nan, math.nan)
    share = float(right.mean())
    return _named(name, share, *wilson(share, len(right)))


def _auc(
    probabilities: Floats, labels: Labels, threshold: Floats, folds: NDArray[np.int64] | None
) -> dict[str, float]:
    auc = math.nan
    if min((labels == 0).sum(), (labels == 1).sum()) >= FEWEST:
        pairs = roc_auc(probabilities, labels)
        auc = float(pairs if folds is None else fold_auc(probabilities, labels, folds))
    if math.isnan(auc):  # too few, or none of either class in the same fold
        return _named("auc", math.nan, math.nan, math.nan)
    interval = bootstrap_metrics(probabilities, labels, threshold, folds)["auc"]
    return _named("auc", auc, *interval)


def _named(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}
