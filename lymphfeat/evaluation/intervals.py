"""Intervals and tests for metrics of repeated splits, and of one fixed model (METHOD §4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from lymphfeat.evaluation.metrics import METRICS, all_metrics, fold_auc
from lymphfeat.runtime.arrays import Floats, Labels


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over splits with its interval, and the p-value of the hypothesis that it is 0.

    `low` and `high` are clipped at the bounds of what is estimated; `half_width` is half the width
    before clipping. All three and `p` are NaN for a single split.
    """

    mean: float
    low: float
    high: float
    half_width: float
    p: float


def corrected_factor(n: int, test_to_train: float) -> float:
    """Return the factor from the variance of n splits' values to the variance of their mean.

    It is 1 / n + n_test / n_train: the training sets of repeated splits overlap, so the values are
    not independent (Nadeau & Bengio, Machine Learning 52, 2003).
    """
    return 1 / n + test_to_train


def t_half_width(
    values: Floats, variance_factor: float | None = None, level: float = 0.95
) -> float:
    """Return half the width of the t interval of the mean of `values` (n,); NaN for fewer than 2.

    `variance_factor` multiplies the sample variance in place of 1 / n (see `corrected_factor`).
    """
    n = len(values)
    if n < 2:
        return math.nan
    factor = 1 / n if variance_factor is None else variance_factor
    return float(stdtrit(n - 1, (1 + level) / 2) * np.sqrt(factor * values.var(ddof=1)))


def estimate(
    values: Floats,
    test_to_train: float,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Return the mean of one value per split (n,) with its corrected t interval and two-sided p.

    The interval is clipped at `bounds`, which cannot make it miss more often, because the true
    value is between them.
    """
    n, mean = len(values), float(values.mean())
    factor = corrected_factor(n, test_to_train)
    half = t_half_width(values, factor, level)
    low, high = np.clip([mean - half, mean + half], *bounds).tolist()
    return Estimate(mean=mean, low=low, high=high, half_width=half, p=_two_sided(values, factor))


def estimate_metric(
    values: Floats, test_to_train: float, bounds: tuple[float, float], rarer: int
) -> Estimate:
    """Return `estimate` of one value of a metric per split (n,), clipped at the metric's bounds.

    Splits that are all perfect show no variance; the lower end then comes from `rarer`, the number
    of patients in the smaller class (see `faultless_low`).
    """
    found = estimate(values, test_to_train, bounds=bounds)
    if len(values) < 2 or bounds[1] != 1 or (values < 1).any():
        return found
    low = faultless_low(rarer)
    return replace(found, low=low, half_width=1 - low)


def faultless_low(patients: int) -> float:
    """Return the lower end of the 95 % interval of a share of 1 among this many patients.

    It is the share at which all of them are right with probability .025.
    """
    return float(0.025 ** (1 / patients))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share of n (Wilson 1927)."""
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _two_sided(values: Floats, factor: float) -> float:
    if len(values) < 2:
        return math.nan
    error = math.sqrt(factor * values.var(ddof=1))
    if error < 1e-12:  # equal in every split
        return 1.0 if abs(values.mean()) < 1e-12 else 0.0
    return float(2 * stdtr(len(values) - 1, -abs(values.mean()) / error))


def holm(p: Floats) -> Floats:
    """Return p-values (m,) adjusted for their number (Holm 1979); NaN is not counted."""
    adjusted = np.full(len(p), np.nan)
    order = [int(i) for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, float(p[i]) * (len(order) - place))
        adjusted[i] = min(1.0, largest)
    return adjusted


def _draw(
    rows: Sequence[NDArray[np.int64]], draws: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw from each group of rows as many as it has, with replacement: (draws, P)."""
    return np.concatenate(
        [part[generator.integers(0, len(part), (draws, len(part)))] for part in rows], axis=1
    )


def draw_counts(labels: Labels, draws: int, generator: np.random.Generator) -> Floats:
    """Draw patients with replacement within their class; return how often each: (draws, P).

    Patients whose label (P,) is unknown (-1) are never drawn.
    """
    counts = np.zeros((draws, len(labels)))
    for label in (0, 1):
        (own,) = np.nonzero(labels == label)
        counts[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), draws)
    return counts


def bootstrap_auc_gain(
    probabilities: Floats,
    others: Floats,
    labels: Labels,
    folds: NDArray[np.int64] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return by how much one AUC exceeds another on the same patients, and its 95 % interval.

    All arrays are (P,). Patients are drawn as in `bootstrap_metrics`, the same for both AUCs, which
    are within `folds`. Returns NaN unless both classes are present.
    """
    if not (labels == 0).any() or not (labels == 1).any():
        return math.nan, math.nan, math.nan
    folds = np.zeros(len(labels), np.int64) if folds is None else folds
    counts = draw_counts(labels, draws, np.random.default_rng(seed))
    gains = fold_auc(probabilities, labels, folds, counts) - fold_auc(others, labels, folds, counts)
    low, high = np.nanquantile(gains, [0.025, 0.975])
    gain = float(fold_auc(probabilities, labels, folds) - fold_auc(others, labels, folds))
    return gain, float(low), float(high)


def _counts(drawn: NDArray[np.int64]) -> Floats:
    """Count how often each patient is in each draw: (draws, P)."""
    draws, patients = drawn.shape
    rows = drawn + patients * np.arange(draws)[:, None]
    return np.bincount(rows.ravel(), minlength=draws * patients).reshape(drawn.shape).astype(float)


def bootstrap_metrics(
    probabilities: Floats,
    labels: Labels,
    threshold: ArrayLike,
    folds: NDArray[np.int64] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return the 95 % bootstrap intervals over patients of all metrics of one fixed model.

    All arrays are (P,); `threshold` is one number or each patient's own. With `folds` the AUC is
    `fold_auc`.

    Patients are drawn with replacement within their class, because the sizes of the classes were
    chosen when the cohort was collected. Where nothing varies (a class all right or all wrong, an
    AUC of 1) draws would have no width: the share of a class is then drawn from Jeffreys'
    posterior, and the lower end of the AUC is `faultless_low`. Returns NaN unless both classes are
    present.
    """
    rows = [np.flatnonzero(labels == label) for label in (0, 1)]
    if not all(len(part) for part in rows):
        return dict.fromkeys(METRICS, (math.nan, math.nan))
    generator = np.random.default_rng(seed)
    drawn = _draw(rows, draws, generator)
    at = np.broadcast_to(threshold, labels.shape)  # (P,)
    found = all_metrics(probabilities[drawn], labels[drawn[0]], at[drawn])
    if folds is not None:
        found["auc"] = fold_auc(probabilities, labels, folds, _counts(drawn))
    for name, part, right in (
        ("specificity", rows[0], (probabilities <= at)[rows[0]]),
        ("sensitivity", rows[1], (probabilities > at)[rows[1]]),
    ):
        if right.all() or not right.any():
            hits = int(right.sum())
            found[name] = generator.beta(hits + 0.5, len(part) - hits + 0.5, draws)
    found["ba"] = (found["sensitivity"] + found["specificity"]) / 2
    intervals = {
        name: (float(low), float(high))
        for name, (low, high) in (
            (name, np.nanquantile(found[name], [0.025, 0.975])) for name in METRICS
        )
    }
    if np.nanmin(found["auc"]) == 1:
        intervals["auc"] = faultless_low(min(len(part) for part in rows)), 1.0
    return intervals
