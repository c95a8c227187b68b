"""Decisions about patients: thresholds learnt on training patients alone, and means of models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.calibration import FARTHEST, Calibration, fit_calibrations, logit
from lymphfeat.evaluation.metrics import EVERYONE, NOBODY, choose_threshold
from lymphfeat.runtime.arrays import Floats, Labels

PREVALENCE, BEST_BA, HALF = RULES = ("prevalence", "best-ba", "0.5")
SENSITIVITIES = (0.8, 0.9, 0.95, 0.99)  # of the operating points in a model
_TIE = 1e-8  # a logit must exceed the mean by more: rounding must not decide


def learn_threshold(
    rule: str,
    probabilities: Floats,
    labels: Labels,
    calibration: Calibration | None = None,
) -> float:
    """Return the probability above which a patient is called tumoral, by one of RULES.

    `prevalence` is the probability whose calibrated value is the mean calibrated value of these
    patients (P,). With Platt scaling this mean is the share of tumoral patients, and a threshold at
    it maximises the expected balanced accuracy of calibrated probabilities. Without an intercept to
    fit (temperature scaling, no calibration) the mean of the probabilities replaces the share,
    because it shifts as they do; where they do not predict the label, its limit is the middle of
    the logits. `best-ba` has the best balanced accuracy on these patients. `0.5` is .5.
    """
    if rule == HALF:
        return 0.5
    if rule == BEST_BA:
        return choose_threshold(probabilities, labels)
    calibration = calibration or Calibration()
    mean = calibration.apply(probabilities).mean(keepdims=True)  # (1,)
    at = logit(calibration.undo(mean)) + _TIE
    return NOBODY if at >= FARTHEST else float(expit(at)[0])


def operating_point(probabilities: Floats, labels: Labels, sensitivity: float) -> float:
    """Return the highest threshold with at least this sensitivity.

    `probabilities` (P,) must be out of fold, and at least one of the labels (P,) tumoral. The
    threshold is half-way to the next lower probability.
    """
    tumoral = np.sort(probabilities[labels == 1])[::-1]
    last = tumoral[math.ceil(sensitivity * len(tumoral) - 1e-9) - 1]  # must be called tumoral
    below = probabilities[probabilities < last]
    if last == 0:
        return EVERYONE
    return float((last + below.max()) / 2 if len(below) else last / 2)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A model's threshold, calibration and operating points, learnt on training patients alone."""

    threshold: float = 0.5
    threshold_from: str = "fixed at .5"
    calibration: Calibration | None = None
    # "0.95" -> the threshold that reached this sensitivity on out-of-fold probabilities
    operating_points: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def learn(
        cls,
        probabilities: Floats,
        labels: Labels,
        *,
        rule: str = PREVALENCE,
        method: str = "platt",
        sensitivities: Sequence[float] = SENSITIVITIES,
        source: str = "out-of-fold probabilities of the training patients",
    ) -> "Decision":
        """Learn threshold, calibration and operating points from OUT-OF-FOLD probabilities (P,).

        `rule` is one of RULES, `method` one of `calibration.METHODS`; `labels` (P,) are 0 and 1.
        """
        (fitted,) = fit_calibrations(probabilities[None], labels, method)
        calibration = None if method == "none" else fitted
        return cls(
            threshold=learn_threshold(rule, probabilities, labels, calibration),
            threshold_from=cls.threshold_from if rule == HALF else f"{_SAID[rule]}, on {source}",
            calibration=calibration,
            operating_points={
                f"{target:g}": operating_point(probabilities, labels, target)
                for target in sensitivities
            },
        )

    @classmethod
    def of_fitted(cls, probabilities: Floats, *, rule: str = PREVALENCE) -> "Decision":
        """Decide without out-of-fold probabilities, by those of the training patients (P,).

        They are too confident to calibrate on, or to choose the best balanced accuracy on: raises
        SettingsError for `best-ba`. Their mean, which is all that `prevalence` uses, is not.
        """
        if rule == BEST_BA:
            refuse_best_ba()
        if rule == HALF:
            return cls()
        return cls(
            threshold=learn_threshold(rule, probabilities, np.empty(0, np.int64)),
            threshold_from=f"the mean probability of the {len(probabilities)} training patients, "
            "as the model fits them",
        )

    def logits(self, probabilities: Floats) -> Floats:
        """Return calibrated logits of probabilities of any shape; without a calibration, theirs."""
        return logit(self.calibrate(probabilities))

    def calibrate(self, probabilities: Floats) -> Floats:
        """Return calibrated probabilities, of any shape; without a calibration, the same."""
        return probabilities if self.calibration is None else self.calibration.apply(probabilities)

    def about_calibrated(self) -> "Decision":
        """Return the same decision about probabilities that it has calibrated already."""

        def moved(threshold: float) -> float:
            if not 0 <= threshold < 1:  # everyone, nobody
                return threshold
            return float(self.calibrate(np.array([threshold]))[0])

        return replace(
            self,
            calibration=None if self.calibration is None else Calibration(),
            threshold=moved(self.threshold),
            operating_points={key: moved(at) for key, at in self.operating_points.items()},
        )

    def at_sensitivity(self, target: float) -> "Decision":
        """Return the decision with an operating point as its threshold.

        Raises SettingsError if the model does not have it.
        """
        key = f"{target:g}"
        if key not in self.operating_points:
            known = ", ".join(self.operating_points) or "none: it has no out-of-fold probabilities"
            raise SettingsError(
                f"sensitivity (={key}) must be an operating point of the model; it has {known}."
            )
        return replace(
            self,
            threshold=self.operating_points[key],
            threshold_from=f"sensitivity {key} on out-of-fold probabilities",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content for a model file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Decision":
        """Read `to_json`'s content; models without calibration may lack its fields."""
        calibration = content.get("calibration")
        return cls(
            threshold=float(content["threshold"]),
            threshold_from=str(content["threshold_from"]),
            calibration=None if calibration is None else Calibration(**calibration),
            operating_points={k: float(v) for k, v in content.get("operating_points", {}).items()},
        )


def refuse_best_ba() -> NoReturn:
    """Raise SettingsError: a single model cannot choose the best balanced accuracy."""
    raise SettingsError(
        "threshold (=best-ba) must be chosen on out-of-fold probabilities; a single model has "
        "none. Train with --folds, or use --threshold prevalence."
    )


_SAID = {
    PREVALENCE: "the mean calibrated probability",
    BEST_BA: "best balanced accuracy",
}


# --- several models ------------------------------------------------------------------------------


def average(decisions: Sequence[Decision], probabilities: Floats) -> Floats:
    """Average several models' probabilities (M, P) as calibrated logits: (P,) probabilities."""
    logits = [d.logits(p) for d, p in zip(decisions, probabilities, strict=True)]
    return np.asarray(expit(np.mean(logits, axis=0)))


def combine(decisions: Sequence[Decision]) -> Decision:
    """Return the decision about the probabilities that `average` returns, on their scale.

    A patient is called tumoral when the mean of the models' calibrated logits exceeds the mean of
    their thresholds' logits. So each threshold is used on the scale on which it was found: a mean
    of probabilities would be nearer to the middle than those of any single model.
    """
    shared = [
        key
        for key in decisions[0].operating_points
        if all(key in d.operating_points for d in decisions)
    ]
    sources = list(dict.fromkeys(d.threshold_from for d in decisions))
    if len(decisions) > 1:
        sources.append(f"{len(decisions)} models, mean of calibrated logits")
    return Decision(
        threshold=_mean_threshold(decisions, [d.threshold for d in decisions]),
        threshold_from="; ".join(sources),
        calibration=None if any(d.calibration is None for d in decisions) else Calibration(),
        operating_points={
            key: _mean_threshold(decisions, [d.operating_points[key] for d in decisions])
            for key in shared
        },
    )


def _mean_threshold(decisions: Sequence[Decision], thresholds: Sequence[float]) -> float:
    logits = [_logit_of(d, at) for d, at in zip(decisions, thresholds, strict=True)]
    return float(expit(np.mean(logits)))


def _logit_of(decision: Decision, threshold: float) -> float:
    if not 0 <= threshold < 1:
        return FARTHEST + 1 if threshold >= 1 else -FARTHEST - 1  # past every logit
    return float(decision.logits(np.array([threshold]))[0])


# --- measured on the patients they were learnt on ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """Decisions about patients, learnt on other folds: (P,) each."""

    calibrated: Floats  # probabilities
    threshold: Floats  # on the scale of probabilities before calibration


def cross_fit_decisions(
    probabilities: Floats,
    labels: Labels,
    folds: NDArray[np.int64],
    *,
    rule: str = PREVALENCE,
    method: str = "platt",
) -> CrossFitted:
    """Calibrate and decide each fold's patients by out-of-fold probabilities of the OTHER folds.

    probabilities, labels, folds: (P,). A threshold measured on the patients it was chosen on is too
    optimistic: `best-ba` reaches a balanced accuracy of .571 on 72 patients with random labels. Not
    fully nested: the models behind the other folds' probabilities were trained on this fold's
    labels (docs/protocols.md says what that changes).
    """
    calibrated, thresholds = np.empty(len(labels)), np.empty(len(labels))
    for fold in np.unique(folds):
        held_out = folds == fold
        decision = Decision.learn(
            probabilities[~held_out],
            labels[~held_out],
            rule=rule,
            method=method,
            sensitivities=(),
        )
        calibrated[held_out] = decision.calibrate(probabilities[held_out])
        thresholds[held_out] = decision.threshold
    return CrossFitted(calibrated=calibrated, threshold=thresholds)
