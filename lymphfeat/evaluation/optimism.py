"""The optimism of the `report` protocol: bootstrap intervals of `report` minus `honest`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lymphfeat.evaluation.intervals import draw_counts
from lymphfeat.evaluation.metrics import ORACLE_THRESHOLDS
from lymphfeat.evaluation.protocol import Outcome
from lymphfeat.evaluation.scores import BEST_EPOCHS
from lymphfeat.runtime.arrays import Floats, Labels

DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The patients that a row calls tumoral in one split."""

    labels: Labels  # (n,) of the validation patients
    rows: NDArray[np.int64]  # (n,) of the validation patients, among all
    # (E, T, n): at every epoch and threshold among which the protocol chooses; otherwise (1, 1, n)
    tumoral: NDArray[np.bool_]


def optimism_interval(
    labels: Labels,
    report: Sequence[Calls],
    honest: Sequence[Calls],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the difference in mean balanced accuracy.

    `labels` (P,) are of all patients. Each draw takes patients with replacement within their class,
    the same for both protocols, and the report's halves with replacement. Epochs and thresholds are
    chosen again in each draw, as the report chooses them; nothing is fitted again. The interval is
    that of the draws around their mean, shifted to the estimate: a draw repeats patients, so
    choosing on it is more optimistic, and the draws themselves are too high. It is clipped to
    [−1, 1]; NaN if no draw has both classes in a split of each protocol.
    """
    generator = np.random.default_rng(seed)
    counts = draw_counts(labels, draws, generator)  # (B, P)
    n = len(report)
    halves = generator.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)  # (B, S)
    found = mean_accuracy(report, counts, halves) - mean_accuracy(honest, counts)
    found = found[np.isfinite(found)]
    if not len(found):
        return np.nan, np.nan
    once = np.ones((1, len(labels)))
    estimate = mean_accuracy(report, once) - mean_accuracy(honest, once)
    ends = np.quantile(found - found.mean(), [0.025, 0.975]) + estimate
    low, high = np.clip(ends, -1, 1).tolist()
    return low, high


def mean_accuracy(calls: Sequence[Calls], counts: Floats, splits: Floats | None = None) -> Floats:
    """Return the mean balanced accuracy over splits in each of B draws: (B,).

    `counts` (B, P) is how often each patient is drawn, `splits` (B, S) how often each split (None:
    once). Each split's is the mean of its ten best epochs, each at its best threshold. A split
    without patients of both classes is left out of the draw.
    """
    found = np.stack([_accuracy(each, counts[:, each.rows]) for each in calls], axis=1)  # (B, S)
    weights = np.isfinite(found) * (1 if splits is None else splits)
    with np.errstate(invalid="ignore"):
        return np.asarray((np.nan_to_num(found) * weights).sum(1) / weights.sum(1))


def _accuracy(calls: Calls, counts: Floats) -> Floats:
    """Return the balanced accuracy of one split: (B,), NaN where a class was not drawn.

    counts: (B, n).
    """
    shares = []
    for label, right in ((1, calls.tumoral), (0, ~calls.tumoral)):
        own = counts[:, calls.labels == label].astype(np.float32)  # (B, n of this class)
        hits = right[..., calls.labels == label].reshape(-1, own.shape[1])  # (E * T, n)
        with np.errstate(invalid="ignore"):
            shares.append(own @ hits.T.astype(np.float32) / own.sum(1, keepdims=True))
    accuracy = (shares[0] + shares[1]) / 2
    accuracy = accuracy.reshape(len(counts), *calls.tumoral.shape[:2]).max(2)  # (B, E)
    best = min(BEST_EPOCHS, accuracy.shape[1])
    return np.asarray(np.partition(accuracy, -best, axis=1)[:, -best:].mean(1), np.float64)


def report_calls(outcome: Outcome, head: str, *, every: int, oracle: bool) -> list[Calls]:
    """Return the patients that a row calls tumoral under `report`, at one epoch in `every`.

    With `oracle` the report chooses thresholds, too.
    """
    patients = outcome.patients
    thresholds = ORACLE_THRESHOLDS if oracle else np.array([0.5])
    curves = outcome.curves(head, every)
    return [
        Calls(
            labels=patients.labels[rows],
            rows=rows,
            tumoral=probabilities[:, None] > thresholds[:, None],
        )
        for rows, probabilities in zip(patients.validation, curves, strict=True)
    ]


def honest_calls(outcome: Outcome, head: str) -> list[Calls]:
    """Return the patients that a row calls tumoral under `honest`."""
    patients, predictions = outcome.patients, outcome.predictions
    table = predictions[predictions["head"] == head].pivot(
        index="split", columns="patient", values="predicted"
    )
    ids = [split.id for split in patients.plan.outer]
    tumoral = table.reindex(index=ids, columns=patients.ids).to_numpy(float) > 0  # (S, P)
    return [
        Calls(labels=patients.labels[rows], rows=rows, tumoral=tumoral[place, rows][None, None])
        for place, rows in enumerate(patients.validation)
    ]
