"""Several heads as one: the mean of their calibrated logits, and a weighted sum of them.

Both are learnt from the training patients' OUT-OF-FOLD logits, as the fusions are, so a head that
only memorises its patients gets no weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from lymphfeat.evaluation.calibration import Calibration, fit_calibrations, logit
from lymphfeat.evaluation.rows import Row
from lymphfeat.evaluation.scores import (
    PlannedPatients,
    Scores,
    cross_fit,
)
from lymphfeat.runtime.arrays import Floats, Labels


def combine_heads(patients: PlannedPatients, heads: Sequence[Scores], row: Row) -> Scores:
    """Average or stack heads that have out-of-fold probabilities, as the row says."""
    return cross_fit(
        patients,
        LEARNERS[row.joint],
        lambda place: judged_logits(heads, place),
        name=row.name,
        kind="average",
    )


def judged_logits(heads: Sequence[Scores], place: int) -> Floats:
    """Return the heads' logits for patients by what was not trained on them, in a split: (P, H)."""
    judged = [
        np.where(np.isnan(head.outer[place]), head.inner[place], head.outer[place])
        for head in heads
    ]
    return np.column_stack([logit(probability) for probability in judged])


@dataclass(frozen=True)
class Mixture:
    """σ(weighted sum of the calibrated logits of heads + intercept)."""

    calibrations: tuple[Calibration, ...]  # of each head
    weights: Floats  # (H,)
    intercept: float = 0.0

    def logits(self, inputs: Floats) -> Floats:
        """Return logits of patients from the heads' logits: (n, H) -> (n,)."""
        return (
            np.asarray(calibrated_logits(self.calibrations, inputs) @ self.weights) + self.intercept
        )

    def __call__(self, inputs: Floats) -> Floats:
        """Return probabilities of patients from the heads' logits: (n, H) -> (n,)."""
        return np.asarray(expit(self.logits(inputs)))


def read_mixture(content: Mapping[str, Any]) -> Mixture:
    """Read what `dataclasses.asdict` makes of a mixture, from JSON. Raises KeyError, TypeError."""
    return Mixture(
        tuple(Calibration(**each) for each in content["calibrations"]),
        np.array(content["weights"], np.float64),
        float(content["intercept"]),
    )


def learn_average(inputs: Floats, labels: Labels) -> Mixture:
    """Average the calibrated logits of heads (n, H)."""
    calibrations = fit_calibrations(expit(inputs.T), labels)
    return Mixture(tuple(calibrations), np.full(len(calibrations), 1 / len(calibrations)))


def learn_stack(inputs: Floats, labels: Labels) -> Mixture:
    """Weight the calibrated logits of heads (n, H): none below 0, shrunk towards equal weights.

    Minimises the log loss + H / 2 · Σ (weight − 1 / H)², with a free intercept.
    """
    from scipy.optimize import minimize  # slow: only stacks and fusions wait for it

    calibrations = tuple(fit_calibrations(expit(inputs.T), labels))
    x = calibrated_logits(calibrations, inputs)  # (n, H)
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
    return Mixture(calibrations, found[:-1], float(found[-1]))


def calibrated_logits(calibrations: Sequence[Calibration], logits: Floats) -> Floats:
    """Calibrate the logits of heads, each by its own: (n, H) -> (n, H)."""
    slopes = np.array([each.slope for each in calibrations])
    intercepts = np.array([each.intercept for each in calibrations])
    return np.asarray(logits * slopes + intercepts)


LEARNERS: Mapping[str, Callable[[Floats, Labels], Mixture]] = {
    "average": learn_average,
    "stack": learn_stack,
}
