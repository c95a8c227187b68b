"""Calibration of probabilities, learnt from out-of-fold ones, and how good it is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.runtime.arrays import Floats, Labels

METHODS = ("platt", "temperature", "none")
BINS = 10
FARTHEST = 15.0  # logits beyond this are clipped: as good as certain
_LEAST_SLOPE = 1e-3  # a calibration must not reverse the ranking
_LEAST_SPREAD = 1e-9  # logits that differ by less are equal


def logit(probabilities: Floats) -> Floats:
    """Return log(p / (1 − p)), clipped to ±15; any shape."""
    with np.errstate(divide="ignore"):
        values = np.log(probabilities) - np.log1p(-probabilities)
    return np.asarray(np.clip(values, -FARTHEST, FARTHEST))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """σ(slope · logit(p) + intercept): Platt scaling, or with intercept 0 temperature scaling."""

    slope: float = 1.0
    intercept: float = 0.0

    def apply(self, probabilities: Floats) -> Floats:
        """Calibrate probabilities, of any shape."""
        calibrated: Floats = expit(self.of_logits(logit(probabilities)))
        return calibrated

    def of_logits(self, logits: Floats) -> Floats:
        """Calibrate logits, of any shape."""
        return np.asarray(self.slope * logits + self.intercept)

    def undo(self, calibrated: Floats) -> Floats:
        """Return the probabilities that `apply` turns into these, of any shape."""
        probabilities: Floats = expit((logit(calibrated) - self.intercept) / self.slope)
        return probabilities


def fit_calibrations(
    probabilities: Floats, labels: Labels, method: str = "platt"
) -> list[Calibration]:
    """Fit one calibration to each row of out-of-fold probabilities (S, P), NaN left out.

    `platt` (Platt 1999, with his smoothed targets) scales and shifts the logits, `temperature`
    (Guo et al. 2017) only scales them, `none` changes nothing. `labels` (P,) are 0 and 1; those of
    patients that are NaN in every row do not matter.
    """
    if method == "none":
        return [Calibration()] * len(probabilities)
    known = ~np.isnan(probabilities)
    count = known.sum(1, keepdims=True)
    moved = method == "platt"
    x = logit(np.where(known, probabilities, 0.5))  # (S, P)
    # Centred and in units of their spread, the logits of any model are fitted alike.
    middle = np.where(moved, (x * known).sum(1, keepdims=True) / count, 0)
    x = (x - middle) * known
    size = np.sqrt((x**2).sum(1, keepdims=True) / count)
    size = np.where(size < _LEAST_SPREAD, 1, size)
    targets = _smoothed(known, labels)
    slope, intercept = _newton(x / size, known, targets, with_intercept=moved)
    flat = slope < _LEAST_SLOPE  # these probabilities do not predict the label
    share = (targets * known).sum(1) / count[:, 0]
    intercept = np.where(flat & moved, logit(share), intercept)
    slope = np.maximum(slope, _LEAST_SLOPE) / size[:, 0]
    intercept = intercept - slope * middle[:, 0]
    return [
        Calibration(slope=float(a), intercept=float(b))
        for a, b in zip(slope, intercept, strict=True)
    ]


def _smoothed(known: NDArray[np.bool_], labels: Labels) -> Floats:
    """Return Platt's targets (S, P), a little away from 0 and 1, so that nothing is certain."""
    tumoral = (known & (labels == 1)).sum(1, keepdims=True)
    reactive = (known & (labels == 0)).sum(1, keepdims=True)
    targets = np.where(labels == 1, (tumoral + 1) / (tumoral + 2), 1 / (reactive + 2))
    return np.asarray(targets, dtype=np.float64)


def _newton(
    x: Floats, known: NDArray[np.bool_], targets: Floats, *, with_intercept: bool
) -> tuple[Floats, Floats]:
    """Maximise the likelihood of σ(a x + b) in every row: a and b, (S,).

    All rows take their steps together, about forty times as fast as one solver per row. A row that
    has converged no longer moves, so the result of a row does not depend on the others.
    """
    a, b = np.zeros(len(x)), np.zeros(len(x))
    moving = np.ones(len(x), bool)
    for _ in range(60):
        p = expit(a[:, None] * x + b[:, None])
        slack, weight = (p - targets) * known, p * (1 - p) * known
        gradient_a, gradient_b = (slack * x).sum(1), slack.sum(1)
        aa, ab, bb = (weight * x * x).sum(1), (weight * x).sum(1), weight.sum(1)
        aa, bb = aa + 1e-9, bb + 1e-9
        if with_intercept:
            determinant = np.maximum(aa * bb - ab * ab, 1e-12)
            step_a = (bb * gradient_a - ab * gradient_b) / determinant
            step_b = (aa * gradient_b - ab * gradient_a) / determinant
        else:
            step_a, step_b = gradient_a / aa, np.zeros_like(b)
        a -= np.clip(step_a, -1, 1) * moving  # a whole step may leap over the optimum
        b -= np.clip(step_b, -1, 1) * moving
        moving &= np.maximum(np.abs(step_a), np.abs(step_b)) >= 1e-9
        if not moving.any():
            break
    return a, b


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability diagram: bins of equal width over the probabilities; (B,), no empty bins."""

    predicted: Floats  # mean probability
    observed: Floats  # share of tumoral patients
    patients: NDArray[np.int64]

    @property
    def error(self) -> float:
        """Return the expected calibration error: mean |observed − predicted| over patients."""
        gaps = np.abs(self.observed - self.predicted)
        return float((gaps * self.patients).sum() / self.patients.sum())


def reliability(probabilities: Floats, labels: Labels, bins: int = BINS) -> Reliability:
    """Compare probabilities (P,) with labels (P,) in bins of equal width."""
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    patients = np.bincount(place, minlength=bins)
    full = patients > 0
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(place, probabilities, bins) / patients
        observed = np.bincount(place, labels, bins) / patients
    return Reliability(predicted=predicted[full], observed=observed[full], patients=patients[full])


def calibration_error(probabilities: Floats, labels: Labels, bins: int = BINS) -> float:
    """Return the expected calibration error (Naeini et al. 2015) over bins of equal width."""
    return reliability(probabilities, labels, bins).error
