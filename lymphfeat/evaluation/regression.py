"""Logistic regression on a few inputs: clinical attributes, bag size, image scores."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from lymphfeat.cohort.attributes import Scaling
from lymphfeat.runtime.arrays import Floats, Labels


@dataclass(frozen=True)
class Logistic:
    """σ(scaled inputs · weights + intercept)."""

    scaling: Scaling
    weights: Floats  # (D,)
    intercept: float

    def parts(self, inputs: Floats) -> Floats:
        """Return what each input adds to the logit: (m, D) -> (m, D)."""
        return np.asarray(self.scaling.apply(inputs) * self.weights)

    def logits(self, inputs: Floats) -> Floats:
        """Return logits: (m, D) -> (m,)."""
        return np.asarray(self.scaling.apply(inputs) @ self.weights + self.intercept)

    def __call__(self, inputs: Floats) -> Floats:
        """Return probabilities: (m, D) -> (m,)."""
        return np.asarray(expit(self.logits(inputs)))


def learn_logistic(inputs: Floats, labels: Labels) -> Logistic:
    """Fit a logistic regression (L2, C 1) on inputs (n, D), standardised over these patients.

    By Newton steps, as scikit-learn's newton-cholesky: a plan takes hundreds of these small fits.
    """
    scaling = Scaling.of(inputs)
    scaled = scaling.apply(inputs)
    weights = _newton(np.column_stack([scaled, np.ones(len(scaled))]), labels)
    return Logistic(scaling, weights[:-1], float(weights[-1]))


def _newton(x: Floats, labels: Labels) -> Floats:
    """Minimise log loss + |w|² / 2, the last weight (the intercept) free: (D,)."""
    penalty = np.ones(x.shape[1])
    penalty[-1] = 0
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        p = expit(x @ weights)
        gradient = x.T @ (p - labels) + penalty * weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        weights -= step * min(1, 2 / max(np.abs(step).max(), 1e-12))  # no leaps
        if np.abs(step).max() < 1e-8:
            break
    return weights
