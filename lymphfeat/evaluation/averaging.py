"""Several heads as one: the mean of their calibrated logits, and a weighted sum of them.

Both are learnt from the training patients' OUT-OF-FOLD logits, as the fusions are, so a head that
only memorises its patients gets no weight.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from lymphfeat.evaluation.calibration import Calibration, fit_calibrations, logit
from lymphfeat.evaluation.scores import (
    Learner,
    PlannedPatients,
    PredictFunction,
    Scores,
    cross_fit,
)
from lymphfeat.runtime.arrays import Floats, Labels


def average_heads(patients: PlannedPatients, heads: Sequence[Scores]) -> list[Scores]:
    """Average and stack heads that have out-of-fold probabilities; none of fewer than two."""
    if len(heads) < 2:
        return []
    return [
        _combine(patients, heads, f"{name} of {len(heads)} heads", learner)
        for name, learner in LEARNERS.items()
    ]


def _combine(
    patients: PlannedPatients, heads: Sequence[Scores], name: str, learner: Learner
) -> Scores:
    def inputs(place: int) -> Floats:
        judged = [
            np.where(np.isnan(head.outer[place]), head.inner[place], head.outer[place])
            for head in heads
        ]
        return np.column_stack([logit(probability) for probability in judged])  # (P, H)

    return cross_fit(patients, learner, inputs, name=name, kind="average")


def learn_average(inputs: Floats, labels: Labels) -> PredictFunction:
    """Average the calibrated logits of heads (n, H)."""
    calibrated = _calibrate(inputs, labels)
    return lambda others: np.asarray(expit(calibrated(others).mean(1)))


def learn_stack(inputs: Floats, labels: Labels) -> PredictFunction:
    """Weight the calibrated logits of heads (n, H): none below 0, shrunk towards equal weights.

    Minimises the log loss + H / 2 · Σ (weight − 1 / H)², with a free intercept.
    """
    calibrated = _calibrate(inputs, labels)
    x = calibrated(inputs)  # (n, H)
    heads = x.shape[1]
    equal = np.append(np.full(heads, 1 / heads), 0.0)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        logits = x @ parameters[:-1] + parameters[-1]
        slack = expit(logits) - labels  # (n,)
        away = parameters - equal
        away[-1] = 0
        value = float((np.logaddexp(0, logits) - labels * logits).sum() + heads / 2 * away @ away)
        return value, np.append(slack @ x, slack.sum()) + heads * away

    bounds = [(0, None)] * heads + [(None, None)]
    found = minimize(loss, equal, jac=True, method="L-BFGS-B", bounds=bounds).x
    return lambda others: np.asarray(expit(calibrated(others) @ found[:-1] + found[-1]))


def _calibrate(inputs: Floats, labels: Labels) -> Callable[[Floats], Floats]:
    """Fit a calibration to each head's logits (n, H); return what calibrates logits (m, H)."""
    calibrations = fit_calibrations(expit(inputs.T), labels)

    def calibrated(others: Floats) -> Floats:
        columns = zip(calibrations, others.T, strict=True)
        return np.column_stack([_apply(calibration, column) for calibration, column in columns])

    return calibrated


def _apply(calibration: Calibration, logits: Floats) -> Floats:
    return calibration.slope * logits + calibration.intercept


LEARNERS: Mapping[str, Learner] = {"average": learn_average, "stack": learn_stack}
