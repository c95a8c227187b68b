"""Whether a patient's images are like those of training, which no probability can tell.

Of every image the distance of its features and its image statistics are compared with those of
training; of every patient, their means, and the distance of the mean image. The limits come from
training patients, each left out whole, and hold for the largest of all deviations together: about
1 % of the images and 5 % of the patients of training are beyond them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from lymphfeat.cohort.image_statistics import STATISTICS
from lymphfeat.model.deviations import (
    UNLIKE_IMAGES,
    Compared,
    Range,
    Spread,
    left_out_deviations,
    starts,
)
from lymphfeat.model.feature_distance import FeatureDistance, left_out_distances
from lymphfeat.runtime.arrays import Floats

UNLIKE_PATIENTS = 0.05  # the share of patients like those of training beyond their limit
_SMALL = 1e-6  # a limit where nothing varies
_NAMED = 3  # measures named per image or patient
_LOOK = "of another look"  # what features say
_WORDS = {each.name: (each.low, each.high) for each in STATISTICS}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How unlike training images and patients are.

    images: unlikeness (1 at the limit), unlike (1 where beyond it), unlike_in (in words).
    patients: the same without words, and unlike_images, the share of their images that are unlike.
    notes: (P,) in words, empty for patients like those of training.
    """

    images: pd.DataFrame
    patients: pd.DataFrame
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """What is like training: of features by each source, and of image statistics."""

    features: tuple[FeatureDistance, ...]
    statistics: tuple[str, ...]  # names
    fewest: int  # images of a training patient
    most: int
    image_limit: float
    patient_limit: float
    image_range: Range
    patient_spread: Spread

    @classmethod
    def learn(
        cls, pooled: Sequence[Floats], statistics: pd.DataFrame | None, sizes: Sequence[int]
    ) -> "Familiarity":
        """Learn from at least three training patients, with so many images each: (P,).

        `pooled` are the features of their images by each source, (N, C); `statistics` (N, S).
        """
        names = () if statistics is None else tuple(map(str, statistics))
        training = _left_out(pooled, _matrix(statistics, names, sizes), sizes)
        images, patients = left_out_deviations(training)
        # Of n left-out patients, the value that a new one exceeds by chance: at rank .95 (n + 1).
        patient_limit = np.quantile(patients, 1 - UNLIKE_PATIENTS, method="weibull")
        return cls(
            features=tuple(FeatureDistance.learn(each) for each in pooled),
            statistics=names,
            fewest=min(sizes),
            most=max(sizes),
            image_limit=max(float(np.quantile(images, 1 - UNLIKE_IMAGES)), _SMALL),
            patient_limit=max(float(patient_limit), _SMALL),
            image_range=Range.of(training),
            patient_spread=Spread.of(training),
        )

    def judge(
        self, pooled: Sequence[Floats], statistics: pd.DataFrame | None, sizes: Sequence[int]
    ) -> Judgement:
        """Compare patients with those of training; arguments as in `learn`.

        Without statistics only features are compared.
        """
        compared = self._compare(pooled, _matrix(statistics, self.statistics, sizes), sizes)
        images = self.image_range.deviations(compared) / self.image_limit
        patients = self.patient_spread.deviations(compared) / self.patient_limit
        found = _judged(images)
        counts = np.add.reduceat(found["unlike"].to_numpy(), starts(sizes)).tolist()  # (P,)
        return Judgement(
            images=found.assign(unlike_in=[self._words(row) for row in images]),
            patients=_judged(patients).assign(unlike_images=np.divide(counts, sizes)),
            notes=tuple(self._note(*each) for each in zip(patients, counts, sizes, strict=True)),
        )

    def _compare(
        self, pooled: Sequence[Floats], statistics: Floats, sizes: Sequence[int]
    ) -> Compared:
        offsets = [0, *np.cumsum(sizes).tolist()]
        pairs = list(zip(self.features, pooled, strict=True))
        distances = [own.of_images(images) for own, images in pairs]
        of_means = [own.of_means(images, offsets) for own, images in pairs]
        return Compared(
            sizes=tuple(sizes),
            distances=_logarithms(distances),
            of_means=_logarithms(of_means),
            statistics=statistics,
        )

    def _words(self, deviations: Floats) -> str:
        """Name what is beyond the limit, the farthest first."""
        names = [_LOOK] * len(self.features) + list(self.statistics) + [_LOOK] * len(self.features)
        order = np.argsort(-np.abs(deviations), kind="stable")
        found = [
            _WORDS.get(names[place], (names[place],) * 2)[int(deviations[place] > 0)]
            for place in order
            if abs(deviations[place]) > 1
        ]
        return ", ".join(list(dict.fromkeys(found))[:_NAMED])

    def _note(self, deviations: Floats, unlike: int, size: int) -> str:
        notes = []
        if words := self._words(deviations):
            also = f" ({unlike} of {size} are, each by itself)" if unlike else ""
            notes.append(f"the images are unlike those of training: {words}{also}")
        if not self.fewest <= size <= self.most:
            images = "1 image" if size == 1 else f"{size} images"
            notes.append(f"{images}; training patients had {self.fewest} to {self.most}")
        return "; ".join(notes)

    def to_json(self) -> dict[str, Any]:
        """Return all but the tensors of `features`, for a model file."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        del content["features"]
        for name in ("image_range", "patient_spread"):
            content[name] = {key: list(own) for key, own in asdict(content[name]).items()}
        return content | {"statistics": list(self.statistics)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], channels: Sequence[int]) -> "Familiarity":
        """Read what `to_json` returned, with blank tensors for sources of so many channels."""
        return cls(
            features=tuple(FeatureDistance(each) for each in channels),
            **dict(content)
            | {
                "statistics": tuple(map(str, content["statistics"])),
                "image_range": Range(**_arrays(content["image_range"])),
                "patient_spread": Spread(**_arrays(content["patient_spread"])),
            },
        )


def _judged(deviations: Floats) -> pd.DataFrame:
    """Tell the largest deviation of each row, and which are beyond the limit, 1."""
    largest = np.abs(deviations).max(1)
    return pd.DataFrame({"unlikeness": largest, "unlike": (largest > 1).astype(np.int64)})


def _arrays(content: Mapping[str, Sequence[float]]) -> dict[str, Floats]:
    return {name: np.array(values, float) for name, values in content.items()}


def _matrix(table: pd.DataFrame | None, names: Sequence[str], sizes: Sequence[int]) -> Floats:
    """Return the statistics `names`, (N, S): NaN where there are none."""
    if table is None:
        return np.full((sum(sizes), len(names)), np.nan)
    return table.reindex(columns=list(names)).to_numpy(float)


def _logarithms(distances: Sequence[Floats]) -> Floats:
    columns = np.column_stack(distances)
    return np.asarray(np.log(np.maximum(columns, np.finfo(float).tiny)))


def _left_out(pooled: Sequence[Floats], statistics: Floats, sizes: Sequence[int]) -> Compared:
    """Compare training patients, each with the others alone."""
    offsets = [0, *np.cumsum(sizes).tolist()]
    found = [list(left_out_distances(images, offsets)) for images in pooled]
    return Compared(
        sizes=tuple(sizes),
        distances=_logarithms([np.concatenate([own for own, _ in each]) for each in found]),
        of_means=_logarithms([np.array([middle for _, middle in each]) for each in found]),
        statistics=statistics,
    )
