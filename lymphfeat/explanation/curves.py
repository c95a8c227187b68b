"""Curves and distributions of a report, as plain arrays for both the page and the plots."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.evaluation.intervals import wilson
from lymphfeat.explanation.subjects import Subject
from lymphfeat.heads.aggregators.weighted import EPSILON
from lymphfeat.heads.stack import HeadStack
from lymphfeat.runtime.arrays import Float32s

Doubles = NDArray[np.float64]


def roc_curve(probability: Doubles, labels: NDArray[np.int64]) -> Doubles:
    """Return the points (false, true positive rate) of the ROC curve: (K, 2), from 0 0 to 1 1.

    The rate of a class without patients is NaN.
    """
    order = np.argsort(-probability, kind="stable")
    ranked, own = probability[order], labels[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of equal probabilities
    with np.errstate(invalid="ignore"):
        true = np.cumsum(own == 1)[last] / np.float64((own == 1).sum())
        false = np.cumsum(own == 0)[last] / np.float64((own == 0).sum())
    return np.concatenate([[[0.0, 0.0]], np.stack([false, true], 1)])


def calibration_curve(probability: Doubles, labels: NDArray[np.int64], bins: int = 5) -> Doubles:
    """Return (mean probability, share tumoral, patients, low, high) of equal groups: (K, 5).

    low and high bound the 95 % interval of the share (Wilson 1927).
    """
    order = np.argsort(probability, kind="stable")
    groups = [group for group in np.array_split(order, min(bins, len(order))) if len(group)]
    rows = []
    for group in groups:
        share, n = float(labels[group].mean()), len(group)
        rows.append((float(probability[group].mean()), share, n, *wilson(share, n)))
    return np.array(rows, np.float64)


@dataclass(frozen=True, kw_only=True)
class WeightCurve:
    """How `bnsigmoid` weighs a logit, before the division by a patient's sum (report, figure 2)."""

    mean: float  # running, of the logits
    deviation: float
    gamma: float
    beta: float

    @classmethod
    def of(cls, subject: Subject) -> "WeightCurve | None":
        """Return the curve of a single head, or None when weights depend on more than the logit."""
        head = subject.readers[0].head
        if len(subject.readers) > 1 or not isinstance(head, HeadStack):
            return None
        if head.settings[0].agg != "bnsigmoid":
            return None
        state = head.state
        return cls(
            mean=float(state.running_mean[0].detach()),
            deviation=float((state.running_var[0].detach() + EPSILON).sqrt()),
            gamma=float(state.gamma[0].detach()),
            beta=float(state.beta[0].detach()),
        )

    def normalize(self, logits: Float32s) -> Float32s:
        """Return (ℓ − μ) / sqrt(V + ε)."""
        normalized: Float32s = ((logits - self.mean) / self.deviation).astype(np.float32)
        return normalized

    def weight(self, normalized: Float32s) -> Float32s:
        """Return σ(β + γ z), in [0, 1]."""
        weight: Float32s = expit(self.beta + self.gamma * normalized).astype(np.float32)
        return weight


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Histograms of a cohort's instance logits: normalised where the head normalises them."""

    edges: Float32s  # (B + 1,)
    counts: NDArray[np.int64]  # (P, B)
    weight: Float32s | None  # (B,) of a logit at each bin's centre; bnsigmoid only
    instances: str  # "pixels" or "images"

    @classmethod
    def of(
        cls, subject: Subject, maps: Float32s, sizes: NDArray[np.int64], bins: int = 32
    ) -> "Distribution":
        """Count the logits of each patient's instances, from maps (N, h, w)."""
        pixels = all(head.unit == "pixel" for head in subject.heads)
        logits = maps.reshape(len(maps), -1)
        logits = logits if pixels else logits.mean(1, keepdims=True)  # (N, U)
        curve = WeightCurve.of(subject)
        values = logits if curve is None else curve.normalize(logits)
        low, high = np.quantile(values, (0.001, 0.999))
        edges = np.linspace(low, max(high, low + 1e-3), bins + 1).astype(np.float32)
        kept = np.clip(values, edges[0], edges[-1])  # the few beyond count at the ends
        parts = np.split(kept, np.cumsum(sizes)[:-1])
        return cls(
            edges=edges,
            counts=np.array([np.histogram(part, edges)[0] for part in parts], np.int64),
            weight=None
            if curve is None
            else curve.weight(((edges[1:] + edges[:-1]) / 2).astype(np.float32)),
            instances="pixels" if pixels else "images",
        )
