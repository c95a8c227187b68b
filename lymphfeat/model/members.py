"""A member of a final model: heads, how they are joined, fused with attributes and decided."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from scipy.special import expit

from lymphfeat.evaluation.averaging import Mixture, read_mixture
from lymphfeat.evaluation.calibration import Calibration, logit
from lymphfeat.evaluation.decision import Decision
from lymphfeat.evaluation.fusion import ExpertsFusion, Fusion, SumFusion, read_fusion
from lymphfeat.evaluation.regression import Logistic
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.head import Head, ReadOut
from lymphfeat.runtime.arrays import Floats

_STEP = 1e-3  # of an image logit, to measure what it moves
IMAGES = "images"  # the first of the groups that a logit is shared out to; then the attributes


@dataclass(frozen=True, kw_only=True)
class Member:
    """Predicts patients from what its heads read out, and from their attributes."""

    heads: tuple[Head, ...]
    sources: tuple[int, ...] = ()  # of the model's, those that its heads read; all if empty
    mixture: Mixture | None = None  # of several heads
    fusion: Fusion | None = None  # with the attributes
    decision: Decision
    image_decision: Decision  # without the attributes

    def image_logits(self, read: Sequence[ReadOut]) -> Floats:
        """Return the patients' logits by what each head read out: (P,)."""
        return self.joined([each.numbers("probability") for each in read])

    def joined(self, probabilities: Sequence[Floats]) -> Floats:
        """Return the patients' logits by each head's probabilities (P,): (P,)."""
        logits = [logit(each) for each in probabilities]
        if self.mixture is None:
            return logits[0]
        return self.mixture.logits(np.column_stack(logits))

    def image_coefficients(self) -> Floats:
        """Return what each head's logit counts in the logit of all: (heads,)."""
        if self.mixture is None:
            return np.ones(1)
        return self.mixture.weights * [each.slope for each in self.mixture.calibrations]

    def head_shares(self) -> Floats:
        """Return how much each head counts in an image's score: (heads,), adding up to 1."""
        counts = self.image_coefficients()
        return np.asarray(np.abs(counts) / np.abs(counts).sum() if counts.any() else counts)

    def fused_logits(self, image_logits: Floats, attributes: Floats | None) -> Floats:
        """Return calibrated logits of patients: (P,); attributes (P, D), or None without them."""
        if self.fusion is None or attributes is None:
            return self.image_decision.logits(expit(image_logits))
        inputs = np.column_stack([image_logits, attributes])
        return self.decision.logits(self.fusion(inputs))

    def attribute_logits(self, attributes: Floats) -> Floats:
        """Return calibrated logits from the attributes (P, D) alone, by the fusion: (P,).

        The images are those of the average training patient; of `sum` they speak for neither class
        beyond the share of tumoral patients, so the clinical logit is left.
        """
        assert self.fusion is not None
        if isinstance(self.fusion, SumFusion):
            return self.decision.logits(self.fusion.clinical(attributes))
        average = np.full(len(attributes), self.fusion.scaling.mean[0])
        return self.fused_logits(average, attributes)

    def parts(
        self, image_logits: Floats, attributes: Floats | None, groups: Sequence[slice]
    ) -> Floats:
        """Return what images and attributes add to the calibrated logit: (P, 1 + groups).

        `groups` are the columns of each attribute. Where the fusion is linear, these are its terms,
        each against the average training patient's, so that they and a constant add up to the
        logit. Of `experts` they are Shapley values, against a patient with average images and
        attributes.
        """
        if self.fusion is None or attributes is None:
            return _slope(self.image_decision) * image_logits[:, None]
        if isinstance(self.fusion, ExpertsFusion):
            return self._shapley(image_logits, attributes, groups)
        terms = _terms(self.fusion, image_logits, attributes)  # (P, 1 + D)
        own = [terms[:, 0], *(terms[:, 1:][:, group].sum(1) for group in groups)]
        return _slope(self.decision) * np.column_stack(own)

    def _shapley(self, image_logits: Floats, attributes: Floats, groups: Sequence[slice]) -> Floats:
        """Average what each group adds over all orders of the groups: (P, 1 + groups)."""
        assert isinstance(self.fusion, ExpertsFusion)
        count = 1 + len(groups)
        average = self.fusion.scaling.mean
        values: dict[frozenset[int], Floats] = {}
        for size in range(count + 1):
            for given in combinations(range(count), size):
                known = np.tile(average, (len(image_logits), 1))
                if 0 in given:
                    known[:, 0] = image_logits
                for number, group in enumerate(groups, 1):
                    if number in given:
                        known[:, 1:][:, group] = attributes[:, group]
                values[frozenset(given)] = self.decision.logits(self.fusion(known))
        parts = np.zeros((len(image_logits), count))
        for known_ones, value in values.items():
            for one in set(range(count)) - known_ones:
                share = 1 / (count * comb(count - 1, len(known_ones)))
                parts[:, one] += share * (values[known_ones | {one}] - value)
        return parts

    def image_values(
        self,
        views: Sequence[Sequence[ReadOut]],
        image_logits: Floats,
        attributes: Floats | None,
        groups: Sequence[slice],
        images: Bags,
    ) -> Floats:
        """Return score, weight and contribution of the images: (3, N).

        Scores and weights are those of the heads, averaged by what each counts. Contributions are
        what the heads say, times the slope of the patient's logit by its `image_logits` (P,), and
        add up to what the images add to it: what belongs to no image is shared out equally.
        """
        part = self.parts(image_logits, attributes, groups)[:, 0]  # (P,)
        moved = self.parts(image_logits + _STEP, attributes, groups)[:, 0]
        owner, shares = images.index.numpy(), self.head_shares()  # (N,), (heads,)
        weight = _mean(views, "weight", shares)
        if all(head.of_logits for head in self.heads):
            slope = (moved - part) / _STEP  # (P,)
            own = slope[owner] * _mean(views, "contribution", self.image_coefficients())
        else:  # shares of a probability
            own = weight * part[owner]
        left = part - np.bincount(owner, own, minlength=len(part))  # (P,)
        own = own + (left / images.sizes.numpy())[owner]
        return np.stack([_mean(views, "score", shares), weight, own])

    def to_json(self) -> dict[str, Any]:
        """Return all but the heads' tensors, for a model file."""
        return {
            "heads": [asdict(head.settings[0]) for head in self.heads],
            "sources": self.sources,
            "mixture": None if self.mixture is None else asdict(self.mixture),
            "fusion": None if self.fusion is None else asdict(self.fusion),
            "decision": self.decision.to_json(),
            "image_decision": self.image_decision.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], heads: Sequence[Head]) -> "Member":
        """Read what `to_json` returned; raises KeyError, TypeError or ValueError if damaged."""
        mixture, fusion = content["mixture"], content["fusion"]
        return cls(
            heads=tuple(heads),
            sources=tuple(content.get("sources", ())),
            mixture=None if mixture is None else read_mixture(mixture),
            fusion=None if fusion is None else read_fusion(fusion),
            decision=Decision.from_json(content["decision"]),
            image_decision=Decision.from_json(content["image_decision"]),
        )


def _mean(views: Sequence[Sequence[ReadOut]], name: str, counts: Floats) -> Floats:
    """Average what the heads say of images over views, each head counting so much: (N,)."""
    values = [
        np.sum([c * read.numbers(name) for c, read in zip(counts, view, strict=True)], axis=0)
        for view in views
    ]
    return np.asarray(np.mean(values, axis=0))


def _slope(decision: Decision) -> float:
    return (decision.calibration or Calibration()).slope


def _terms(fusion: Logistic | SumFusion, image_logits: Floats, attributes: Floats) -> Floats:
    """Return the terms of a linear fusion's logit: (P, 1 + D)."""
    if isinstance(fusion, Logistic):
        return fusion.parts(np.column_stack([image_logits, attributes]))
    image = fusion.calibration.slope * image_logits
    return np.column_stack([image, fusion.clinical.parts(attributes)])
