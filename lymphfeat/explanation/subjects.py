"""What is explained, seen alike: a single model, the members of an ensemble, or a final model.

Each has heads that read images; their read-outs are judged together, as `predict` does.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.calibration import Calibration, logit
from lymphfeat.evaluation.decision import combine
from lymphfeat.heads.aggregators.networks import Attention
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.head import Head, ReadOut
from lymphfeat.heads.stack import HeadStack, NetworkHead
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.familiarity import Familiarity
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import AnyModel
from lymphfeat.model.members import Member
from lymphfeat.model.model import Model
from lymphfeat.model.sources import BackboneSource, refuse_imported
from lymphfeat.runtime.arrays import Floats
from lymphfeat.settings import HeadSettings

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A head, and what it reads."""

    head: Head
    sources: tuple[int, ...] = (0,)  # the backbones whose features it reads, side by side
    share: float = 1.0  # how much it counts in an image's score; all readers' add up to 1

    @property
    def settings(self) -> HeadSettings:
        """The settings of the head."""
        return self.head.settings[0]

    @property
    def sees_fields(self) -> bool:
        """Whether fields of a picture can have scores of their own."""
        scored = isinstance(self.head, HeadStack | DistributionHead)
        return scored and len(self.sources) == 1

    @property
    def attends(self) -> bool:
        """Whether it weighs images by attention."""
        return isinstance(self.head, NetworkHead) and isinstance(self.head.network, Attention)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What all heads together say of patients and of their images."""

    probability: Floats  # (P,) as `predict` gives it
    total: Floats  # (P,) what contributions, shares and a rest add up to
    score: Floats  # (N,)
    weight: Floats  # (N,)
    contribution: Floats  # (N,)
    shares: Floats  # (P, A) what each attribute adds to the total
    # probabilities (P,) from images, and from attributes, alone; None if only images count
    without_attributes: Floats | None = None
    without_images: Floats | None = None
    # (P,) standard deviation, and (M, P) calibrated logits, of several members
    spread: Floats | None = None
    members: Floats | None = None


class Subject(ABC):
    """A model whose decisions about the patients of a table are explained."""

    model: AnyModel
    sources: tuple[BackboneSource, ...]
    readers: tuple[Reader, ...]
    attributes: tuple[str, ...] = ()  # the attributes that count
    tta: bool = False  # whether `predict` averages over flips
    members: int = 1
    familiarity: Familiarity | None = None  # what training images were like, if it is known

    @property
    def of_logits(self) -> bool:
        """Whether contributions are shares of a logit, not of a probability."""
        return all(reader.head.of_logits for reader in self.readers)

    @property
    def crop(self) -> int:
        """The side of the pictures that are read, in pixels."""
        return self.sources[0].recipe.crop

    @property
    def heads(self) -> list[HeadSettings]:
        """The different heads."""
        return list(dict.fromkeys(reader.settings for reader in self.readers))

    @property
    def model_is_final(self) -> bool:
        """Whether what counts is a calibrated logit, to which images and attributes add."""
        return isinstance(self.model, FinalModel)

    @property
    def joint(self) -> bool:
        """Whether a head reads the features of several backbones together."""
        return any(len(reader.sources) > 1 for reader in self.readers)

    @property
    def attends(self) -> bool:
        """Whether images are weighed by attention alone."""
        return all(reader.attends for reader in self.readers)

    def notes(self) -> dict[str, list[str]]:
        """Return what is unusual about the attributes of the table's patients, by id."""
        return {}

    def read(self, kept: Sequence[Tensor], images: Bags) -> list[ReadOut]:
        """Read out patients by every head, from what each keeps of their images (N, U, D)."""
        return [
            reader.head.read_out(own, images)
            for reader, own in zip(self.readers, kept, strict=True)
        ]

    def probability(self, kept: Sequence[Tensor], images: Bags, patients: Rows) -> Floats:
        """Return the probabilities (P,) of a `judge`; `patients` (P,) are rows of the table."""
        each = [
            reader.head.patient_probability(own, images).double().numpy()
            for reader, own in zip(self.readers, kept, strict=True)
        ]
        return self._together(each, patients)

    def out_of_fold(self, keys: Sequence[PatientKey], members: Floats | None) -> pd.DataFrame:
        """Return what was said of training patients by what had not seen their label.

        `members` (M, P) are calibrated logits. By row: probability, threshold, fold; missing where
        nothing such is known.
        """
        columns = ["probability", "threshold", "fold"]
        return pd.DataFrame(np.nan, index=range(len(keys)), columns=columns)

    @abstractmethod
    def _together(self, probabilities: Sequence[Floats], patients: Rows) -> Floats:
        """Return the probabilities (P,) of all heads together, from each head's (P,)."""

    @abstractmethod
    def judge(self, read: Sequence[ReadOut], images: Bags, patients: Rows) -> Judgement:
        """Judge patients by what every head read out; `patients` (P,) are rows of the table."""


def subject_of(model: AnyModel, table: pd.DataFrame, *, lenient: bool = False) -> Subject:
    """Return a model as something that can be explained on the patients of a table.

    Raises CohortError for a table without the attributes that the model reads, unless `lenient`,
    and SettingsError for members whose contributions are of different kinds.
    """
    if isinstance(model, FinalModel):
        return _Final(model, model.attributes.complete(table) if lenient else table)
    return _Members(model) if isinstance(model, Ensemble) else _Single(model)


class _Single(Subject):
    """A model of `endtoend`."""

    def __init__(self, model: Model) -> None:
        self.model, self.tta = model, model.tta
        self.sources = (BackboneSource(backbone=model.backbone, recipe=model.recipe),)
        self.readers = (Reader(head=model.head),)

    def _together(self, probabilities: Sequence[Floats], patients: Rows) -> Floats:
        return probabilities[0]

    def judge(self, read: Sequence[ReadOut], images: Bags, patients: Rows) -> Judgement:
        (own,) = read
        return Judgement(
            probability=own.numbers("probability"),
            total=own.numbers("total"),
            score=own.numbers("score"),
            weight=own.numbers("weight"),
            contribution=own.numbers("contribution"),
            shares=np.zeros((len(patients), 0)),
        )


class _Members(Subject):
    """Models of `endtoend --folds`, averaged: their scores, weights and contributions are means."""

    def __init__(self, model: Ensemble) -> None:
        self.model, self._ensemble, self._models = model, model, model.models
        self.members, self.tta = len(model.models), any(each.tta for each in model.models)
        self.sources = tuple(
            BackboneSource(backbone=m.backbone, recipe=m.recipe) for m in model.models
        )
        self.readers = tuple(
            Reader(head=each.head, sources=(number,), share=1 / self.members)
            for number, each in enumerate(model.models)
        )
        if len({each.head.of_logits for each in model.models}) > 1:
            raise SettingsError(
                "model must have members of one kind to be explained: the contributions to a "
                "ranking head are shares of a probability, to others of a logit. Explain one of "
                "them: --model FOLDER/fold-0 (in Python, model.models[0])."
            )

    def _together(self, probabilities: Sequence[Floats], patients: Rows) -> Floats:
        return self._ensemble.together(np.stack(probabilities))[0]

    def judge(self, read: Sequence[ReadOut], images: Bags, patients: Rows) -> Judgement:
        def mean(name: str) -> Floats:
            return np.asarray(np.mean([each.numbers(name) for each in read], axis=0))

        each = np.stack([own.numbers("probability") for own in read])  # (M, P)
        probability, calibrated = self._ensemble.together(each)
        return Judgement(
            probability=probability,
            total=mean("total"),
            score=mean("score"),
            weight=mean("weight"),
            contribution=mean("contribution"),
            shares=np.zeros((len(patients), 0)),
            spread=np.std(calibrated, axis=0),
            members=logit(calibrated),
        )

    def out_of_fold(self, keys: Sequence[PatientKey], members: Floats | None) -> pd.DataFrame:
        found = super().out_of_fold(keys, members)
        if self._ensemble.recalibration is not None:  # by patients of another laboratory
            return found
        seen = np.array([each.seen(keys) for each in self._models]) == "label"  # (M, P)
        for row in np.flatnonzero(seen.any(0) & ~seen.all(0)).tolist():
            (own,) = np.nonzero(~seen[:, row])
            assert members is not None
            threshold = combine([self._models[number].decision for number in own]).threshold
            found.loc[row] = (float(expit(members[own, row].mean())), threshold, float(own[0]))
        return found


class _Final(Subject):
    """A final model; what counts is its calibrated logit, whatever its heads give."""

    def __init__(self, model: FinalModel, table: pd.DataFrame) -> None:
        self.model, self._final = model, model
        self.sources = tuple(refuse_imported(model.sources))
        self.tta, self.members = model.tta, len(model.members)
        self.attributes = model.attributes.names if model.fused else ()
        self._numbers = model.attributes.matrix(table) if model.fused else None  # (P, D)
        self._table = table
        self.familiarity = model.familiarity
        self._last = model.last_calibration(model.judging)
        everything = tuple(range(len(model.sources)))
        self.readers = tuple(
            Reader(head=head, sources=member.sources or everything, share=share / self.members)
            for member in model.members
            for head, share in zip(member.heads, member.head_shares().tolist(), strict=True)
        )

    @property
    def of_logits(self) -> bool:
        return True

    def notes(self) -> dict[str, list[str]]:
        return self._final.attributes.notes(self._table) if self.attributes else {}

    def _by_member(self, each: Sequence[Any]) -> list[tuple[Member, Sequence[Any]]]:
        """Cut what belongs to each head into what belongs to each member's."""
        members = self._final.members
        ends = np.cumsum([len(member.heads) for member in members]).tolist()
        return [(m, each[end - len(m.heads) : end]) for m, end in zip(members, ends, strict=True)]

    def _given(self, patients: Rows) -> Floats | None:
        return None if self._numbers is None else self._numbers[patients]

    def _together(self, probabilities: Sequence[Floats], patients: Rows) -> Floats:
        given = self._given(patients)
        logits = [m.fused_logits(m.joined(own), given) for m, own in self._by_member(probabilities)]
        return _mean_probability(logits, self._last)

    def judge(self, read: Sequence[ReadOut], images: Bags, patients: Rows) -> Judgement:
        given, groups = self._given(patients), self._final.attributes.groups
        members = [(m, own, m.image_logits(own)) for m, own in self._by_member(read)]
        logits = [self._last.of_logits(m.fused_logits(image, given)) for m, _, image in members]
        total = np.asarray(np.mean(logits, axis=0))  # (P,)
        parts = np.mean([m.parts(image, given, groups) for m, _, image in members], axis=0)
        alone = [m.fused_logits(image, None) for m, _, image in members]
        score, weight, contribution = np.mean(
            [m.image_values([own], image, given, groups, images) for m, own, image in members],
            axis=0,
        )
        return Judgement(
            probability=np.asarray(expit(total)),
            total=total,
            score=score,
            weight=weight,
            contribution=self._last.slope * contribution,
            shares=self._last.slope * parts[:, 1:],
            without_attributes=None
            if given is None
            else _mean_probability(alone, self._final.last_calibration("images")),
            without_images=None
            if given is None
            else _mean_probability([m.attribute_logits(given) for m, _, _ in members], self._last),
            spread=np.std(expit(logits), axis=0) if len(members) > 1 else None,
        )

    def out_of_fold(self, keys: Sequence[PatientKey], members: Floats | None) -> pd.DataFrame:
        seen = np.array(self._final.seen(keys)) == "label"
        known = self._final.out_of_fold.reindex([key.id for key in keys])
        return known.reset_index(drop=True).where(pd.Series(seen))


def _mean_probability(logits: Sequence[Floats], last: Calibration) -> Floats:
    """Return the probabilities (P,) of the calibrated mean of members' logits (M, P)."""
    return np.asarray(expit(last.of_logits(np.mean(logits, axis=0))))
