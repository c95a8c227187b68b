"""Image score and clinical attributes fused into one probability (METHOD §5).

All fusions are learnt from OUT-OF-FOLD image logits of the training patients: a head's logits for
patients it was trained on are far too confident, and would drown out the attributes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.cohort.attributes import Scaling
from lymphfeat.cohort.splits import Plan
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.averaging import judged_logits
from lymphfeat.evaluation.calibration import Calibration, fit_calibrations, logit
from lymphfeat.evaluation.regression import Logistic, learn_logistic
from lymphfeat.evaluation.rows import fused_name
from lymphfeat.evaluation.scores import (
    PlannedPatients,
    Scores,
    cross_fit,
)
from lymphfeat.runtime.arrays import Floats, Labels

_SHRINKAGE = 1.0  # of the experts' weights, as C 1 of a logistic regression


def choose_fusions(names: Sequence[str], plan: Plan, attributes: Floats) -> list[str]:
    """Return the fusions that `names` asks for, each once; `all` is late, sum and experts.

    Raises SettingsError for an unknown name, without attributes (P, D), or without inner splits.
    """
    chosen = list(FUSIONS) if "all" in names else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in FUSIONS]
    if unknown:
        raise SettingsError(f"fusion (={unknown[0]}) must be one of {', '.join(FUSIONS)}, or all.")
    if chosen and not attributes.shape[1]:
        raise SettingsError(
            "fusion requires clinical attributes; the cohort's table has none. Add columns to it, "
            "or leave out --fusion."
        )
    if chosen and not plan.is_nested:
        raise SettingsError(
            "fusion requires out-of-fold image logits, which neither the report protocol nor "
            "features fine-tuned without inner splits have. Use --protocol honest, and for "
            "fine-tuned features extract with --splits kfold:5+inner."
        )
    return chosen


def fit_fusions(
    patients: PlannedPatients, heads: Sequence[Scores], names: Sequence[str], attributes: Floats
) -> list[Scores]:
    """Fuse each head with the attributes (P, D) in each way named (see `choose_fusions`)."""
    return [_fuse(patients, head, name, attributes) for head in heads for name in names]


def _fuse(patients: PlannedPatients, head: Scores, name: str, attributes: Floats) -> Scores:
    def inputs(place: int) -> Floats:
        return np.column_stack([judged_logits([head], place), attributes])  # (P, 1 + D)

    named = fused_name(head.name, name)
    return cross_fit(patients, FUSIONS[name], inputs, name=named, kind="fusion")


@dataclass(frozen=True)
class SumFusion:
    """The calibrated image logit and the clinical logit, less the prior, which both count."""

    calibration: Calibration
    clinical: Logistic
    prior: float  # logit of the share of tumoral patients

    def __call__(self, inputs: Floats) -> Floats:
        """Return probabilities: (m, 1 + D) -> (m,)."""
        image = self.calibration.apply(expit(inputs[:, 0]))
        clinical = self.clinical(inputs[:, 1:])
        return np.asarray(expit(logit(image) + logit(clinical) - self.prior))


def learn_sum(inputs: Floats, labels: Labels) -> SumFusion:
    """Fit a `SumFusion`: inputs (n, 1 + D), the image logit first; labels (n,)."""
    (calibration,) = fit_calibrations(expit(inputs[None, :, 0]), labels)
    clinical = learn_logistic(inputs[:, 1:], labels)
    return SumFusion(calibration, clinical, float(logit(np.array(labels.mean()))))


@dataclass(frozen=True)
class ExpertsFusion:
    """p = π σ(s_img) + (1 − π) σ(s_clin), the gate π from both (Sahasrabudhe et al. 2021).

    s_img is the image logit scaled and shifted, s_clin is linear in the attributes, the gate's
    logit is linear in both.
    """

    scaling: Scaling
    parameters: Floats  # (2 · (2 + D) + 1,), see `_experts`

    def __call__(self, inputs: Floats) -> Floats:
        """Return probabilities: (m, 1 + D) -> (m,)."""
        image, clinical, gate = _experts(self.parameters, self.scaling.apply(inputs))
        return gate * image + (1 - gate) * clinical


def learn_experts(inputs: Floats, labels: Labels) -> ExpertsFusion:
    """Fit `ExpertsFusion` by maximum likelihood, all parts together.

    Weights are shrunk towards 0, the scale of s_img towards 1. inputs: (n, 1 + D), the image logit
    first.
    """
    from scipy.optimize import minimize  # slow: only stacks and fusions wait for it

    scaling = Scaling.of(inputs)
    spread = float(np.std(inputs[:, 0])) or 1.0  # a stretch of 1 in raw logits
    start = np.zeros(2 * (1 + inputs.shape[1]) + 1)
    start[0] = spread
    found = minimize(
        partial(_experts_loss, x=scaling.apply(inputs), labels=labels, anchor=start.copy()),
        start,
        jac=True,
        method="L-BFGS-B",
    ).x
    return ExpertsFusion(scaling, found)


def _experts(parameters: Floats, x: Floats) -> tuple[Floats, Floats, Floats]:
    """Return σ(s_img), σ(s_clin) and the gate of standardised inputs (n, 1 + D), each (n,)."""
    d = x.shape[1]
    stretch, move = parameters[:2]
    clinical, gate = parameters[2 : 2 + d], parameters[2 + d :]
    return (
        expit(stretch * x[:, 0] + move),
        expit(x[:, 1:] @ clinical[:-1] + clinical[-1]),
        expit(x @ gate[:-1] + gate[-1]),
    )


def _experts_loss(
    parameters: Floats, x: Floats, labels: Labels, anchor: Floats
) -> tuple[float, Floats]:
    """Return the shrunk negative log likelihood and its gradient."""
    image, clinical, gate = _experts(parameters, x)
    p = np.clip(gate * image + (1 - gate) * clinical, 1e-9, 1 - 1e-9)
    slope = (p - labels) / (p * (1 - p))  # d loss / d p
    by_image = slope * gate * image * (1 - image)
    by_clinical = slope * (1 - gate) * clinical * (1 - clinical)
    by_gate = slope * (image - clinical) * gate * (1 - gate)
    away = parameters - anchor
    d = x.shape[1]
    away[[1, 1 + d]] = 0  # s_img's and s_clin's offsets are free; the gate's is shrunk
    loss = -float(np.where(labels == 1, np.log(p), np.log1p(-p)).sum())
    gradient = np.concatenate(
        [
            [by_image @ x[:, 0], by_image.sum()],
            [*(by_clinical @ x[:, 1:]), by_clinical.sum()],
            [*(by_gate @ x), by_gate.sum()],
        ]
    )
    return loss + _SHRINKAGE * float(away @ away) / 2, gradient + _SHRINKAGE * away


Fusion = Logistic | SumFusion | ExpertsFusion
FUSIONS: Mapping[str, Callable[[Floats, Labels], Fusion]] = {
    "late": learn_logistic,
    "sum": learn_sum,
    "experts": learn_experts,
}


def cross_fit_fusion(name: str, inputs: Floats, labels: Labels, folds: NDArray[np.int64]) -> Floats:
    """Fuse each fold's patients by a fusion that is learnt on the OTHER folds: probabilities (P,).

    inputs: (P, 1 + D), the out-of-fold image logit first; labels and folds: (P,).
    """
    fused = np.empty(len(labels))
    for fold in np.unique(folds):
        held_out = folds == fold
        learnt = FUSIONS[name](inputs[~held_out], labels[~held_out])
        fused[held_out] = learnt(inputs[held_out])
    return fused


def read_fusion(content: Mapping[str, Any]) -> Fusion:
    """Read what `dataclasses.asdict` makes of a fusion, from JSON. Raises KeyError, ValueError."""
    if "parameters" in content:
        return ExpertsFusion(_read_scaling(content["scaling"]), np.array(content["parameters"]))
    if "calibration" in content:
        clinical = _read_logistic(content["clinical"])
        return SumFusion(Calibration(**content["calibration"]), clinical, float(content["prior"]))
    return _read_logistic(content)


def _read_logistic(content: Mapping[str, Any]) -> Logistic:
    weights = np.array(content["weights"], np.float64)
    return Logistic(_read_scaling(content["scaling"]), weights, float(content["intercept"]))


def _read_scaling(content: Mapping[str, Any]) -> Scaling:
    return Scaling(*(np.array(content[name], np.float64) for name in ("mean", "scale")))
