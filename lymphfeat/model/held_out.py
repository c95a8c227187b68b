"""What a model's row said of patients that it had not seen, kept in the model.

It says how often a decision is right, and lets the model abstain (class-conditional conformal
sets: Vovk, Gammerman and Shafer 2005; cross-conformal: Vovk 2015).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.decision import Decision
from lymphfeat.evaluation.predictive_values import Rates, rates_from_json
from lymphfeat.runtime.arrays import Floats, Labels

Scheme = Literal["members", "refit", "recalibrated"]
ANSWERS = ("reactive", "tumoral", "refer")
# What holds of a set's coverage, by how patients were held out.
GUARANTEES: Mapping[Scheme, str] = {
    "members": "cross-conformal: of patients like those of training, at most about 2α of each "
    "class are called the other, in simulations α",
    "refit": "cross-conformal, but the model was refit on everybody: no bound is proved; in "
    "simulations α of each class are called the other",
    "recalibrated": "split conformal: of patients like those of the recalibration, at most α of "
    "each class are called the other",
}
MEASURED = ""  # the name of the rates at the model's own threshold


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The calibrated logits of patients by a model, or member, that was not trained on them.

    `scheme` is `members` when each patient was judged by the member that had not seen it, `refit`
    when by heads of a fold while the model was refit on everybody, `recalibrated` when the model
    had seen none of them.
    """

    scheme: Scheme
    logits: Floats  # (n,)
    labels: Labels  # (n,) 0 or 1
    member: NDArray[np.int64]  # (n,) who judged: the number of the member; 0 if there is one judge
    ids: tuple[str, ...] = ()  # (n,) of the patients; not in old models
    # by operating point, `MEASURED` the model's threshold: each fold decided by the others
    rates: Mapping[str, Rates] = field(default_factory=dict)
    calibrated_for: float | None = None  # a prevalence other than theirs

    @classmethod
    def of(
        cls,
        probabilities: Floats,
        labels: Labels,
        folds: NDArray[np.int64],
        *,
        measured_by: Sequence[Decision],
        kept: Sequence[Decision],
        ids: Sequence[str] = (),
    ) -> "HeldOut":
        """Take out-of-fold probabilities of the patients (n,) of numbered folds (n,).

        `measured_by` decides each fold without its patients. `kept` is the decision of the model's
        members, one per fold, or of the one that was refit on everybody.
        """
        refit = len(kept) == 1
        member = np.zeros_like(folds) if refit else folds
        logits = [kept[k].logits(p) for k, p in zip(member, probabilities, strict=True)]
        return cls(
            scheme="refit" if refit else "members",
            logits=np.array(logits),
            labels=labels,
            member=member,
            ids=tuple(map(str, ids)),
            rates=_rates(measured_by, folds, probabilities, labels),
        )

    @property
    def prevalence(self) -> float:
        """The share of tumoral patients that probabilities are calibrated for."""
        return self.calibrated_for or float(self.labels.mean())

    def p_values(self, logits: Floats) -> Floats:
        """Return how usual patients are for each class: (P, 2), reactive first.

        logits: (M, P), of the members; of the model itself unless the scheme is `members`. A class
        has the share of its held-out patients that were at least as unlike it as the patient is,
        the patient counted among them.
        """
        found = np.empty((logits.shape[1], 2))
        for label, sign in ((0, 1), (1, -1)):  # the higher, the less like the class
            own = self.labels == label
            new, known = sign * logits[self.member[own]], sign * self.logits[own]  # (n, P), (n,)
            found[:, label] = ((known[:, None] >= new).sum(0) + 1) / (own.sum() + 1)
        return found

    def check_alpha(self, alpha: float) -> None:
        """Raise SettingsError unless there are enough patients of each class to abstain at α."""
        if not 0 < alpha < 1:
            raise SettingsError(f"alpha (={alpha:g}) must be above 0 and below 1.")
        least = math.ceil(1 / alpha - 1 - 1e-9)
        counts = np.bincount(self.labels, minlength=2)
        if counts.min() < least:
            raise SettingsError(
                f"alpha (={alpha:g}) must be at least 1 / (n + 1), n being the size of the smaller "
                f"class, so {least} patients of each class are needed; the model was made with "
                f"{counts[0]} reactive and {counts[1]} tumoral ones. Use a larger --alpha."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the content for a model file."""
        return {
            "scheme": self.scheme,
            "logits": self.logits,
            "labels": self.labels,
            "member": self.member,
            "ids": self.ids,
            "rates": {name: vars(each) for name, each in self.rates.items()},
            "calibrated_for": self.calibrated_for,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "HeldOut":
        """Read what `to_json` returned; raises KeyError, TypeError or ValueError if damaged."""
        if content["scheme"] not in GUARANTEES:
            raise ValueError(f"unknown scheme {content['scheme']}")
        logits = np.array(content["logits"], np.float64)
        labels = np.array(content["labels"], np.int64)
        member = np.array(content["member"], np.int64)
        ids = tuple(map(str, content.get("ids", ())))
        if not (logits.shape == labels.shape == member.shape == (len(labels),)):
            raise ValueError("logits, labels and member must be of the same patients")
        if not np.isin(labels, (0, 1)).all() or len(ids) not in (0, len(labels)):
            raise ValueError("labels must be 0 or 1, and every patient must have an id")
        return cls(
            scheme=content["scheme"],
            logits=logits,
            labels=labels,
            member=member,
            ids=ids,
            rates=rates_from_json(content["rates"]),
            calibrated_for=content["calibrated_for"],
        )


def _rates(
    decisions: Sequence[Decision], folds: NDArray[np.int64], probabilities: Floats, labels: Labels
) -> dict[str, Rates]:
    """Count what each fold's decision makes of its patients (n,), at each operating point."""
    thresholds = {MEASURED: [each.threshold for each in decisions]} | {
        name: [each.operating_points[name] for each in decisions]
        for name in decisions[0].operating_points
    }
    return {
        name: Rates.of((probabilities > np.array(at)[folds]).astype(np.int64), labels)
        for name, at in thresholds.items()
    }


def answers(p_values: Floats, alpha: float) -> list[str]:
    """Return one of `ANSWERS` per patient: a class if the other alone can be ruled out.

    p_values: (P, 2). A set with both classes and an empty one both mean `refer`.
    """
    possible = p_values > alpha  # (P, 2)
    names = np.where(possible[:, 1], ANSWERS[1], ANSWERS[0])
    answered = np.where(possible.sum(1) == 1, names, ANSWERS[2])
    return [str(each) for each in answered]
