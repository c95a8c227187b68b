"""Whether a patient's images are like those of training, which no probability can tell.

Of every image the distance of its features and its image statistics are compared with those of
training; of every patient, their means, and the distance of the mean image. The limits come from
training patients, each left out whole, and hold for the largest of all deviations together: about
1 % of the images and 5 % of the patients of training are beyond them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from lymphfeat.cohort.image_statistics import STATISTICS
from lymphfeat.model.feature_distance import FeatureDistance, left_out_distances
from lymphfeat.runtime.arrays import Floats

UNLIKE_IMAGES, UNLIKE_PATIENTS = 0.01, 0.05  # shares of training that are beyond the limits
FEWEST = 3  # patients to learn from
_LEAST = 0.01  # in the units of every measure, a deviation that does not matter
_SMALL = 1e-6  # a limit where nothing varies
_NAMED = 3  # measures named per image or patient
_LOOK = "of another look"  # what features say
_WORDS = {each.name: (each.low, each.high) for each in STATISTICS}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is compared of patients: distances of features, in logarithms, and image statistics."""

    sizes: tuple[int, ...]  # (P,) numbers of images
    distances: Floats  # (N, D) by each source
    of_means: Floats  # (P, D) of the patients' mean images
    statistics: Floats  # (N, S) NaN where unknown

    @property
    def values(self) -> Floats:
        """All measures of images: (N, D + S)."""
        return np.hstack([self.distances, self.statistics])

    @property
    def means(self) -> Floats:
        """Their means over each patient's images: (P, D + S)."""
        sums = np.add.reduceat(self.values, _starts(self.sizes))
        return np.asarray(sums / np.array(self.sizes)[:, None])

    def each_left_out(self) -> Iterator[tuple[Self, Self]]:
        """Yield all patients but one, and that one."""
        owner = np.repeat(np.arange(len(self.sizes)), self.sizes)
        for place in range(len(self.sizes)):
            own = np.arange(len(self.sizes)) == place
            yield self._select(~own, owner != place), self._select(own, owner == place)

    def _select(self, patients: Any, images: Any) -> Self:
        return type(self)(
            sizes=tuple(np.array(self.sizes)[patients].tolist()),
            distances=self.distances[images],
            of_means=self.of_means[patients],
            statistics=self.statistics[images],
        )


@dataclass(frozen=True, kw_only=True)
class _Range:
    """The middle of training images, and their limits if each measure stood alone: (D + S,)."""

    middle: Floats
    low: Floats
    high: Floats

    @classmethod
    def of(cls, training: Compared) -> Self:
        half = UNLIKE_IMAGES / 2
        low, middle, high = np.quantile(training.values, [half, 0.5, 1 - half], axis=0)
        return cls(middle=middle, low=low, high=high)

    def deviations(self, compared: Compared) -> Floats:
        """Return by how much images deviate, about 1 at the limits: (N, D + S)."""
        values = compared.values
        scale = np.where(values < self.middle, self.middle - self.low, self.high - self.middle)
        found = (values - self.middle) / np.maximum(scale, _LEAST)
        return _upwards(found, compared.distances.shape[1])


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """How training patients' means vary, with the patient and with the images drawn.

    A mean image of n images is squared on average `fixed + drawn / n` from training: (D,) each.
    The others are of the means, (D + S,), then of the logarithm of what is over that, (D,).
    """

    fixed: Floats
    drawn: Floats
    middle: Floats
    between: Floats  # variance of patients
    within: Floats  # variance of a patient's images

    @classmethod
    def of(cls, training: Compared) -> Self:
        sizes = np.array(training.sizes, float)
        expected = np.array([_fit_squares(own, sizes) for own in training.of_means.T])  # (D, 2)
        fixed, drawn = expected.reshape(-1, 2).T
        values = np.hstack([training.means, _over(training, fixed, drawn)])  # (P, D + S + D)
        within = np.concatenate([_within(training), np.zeros(len(fixed))])
        between = values.var(0, ddof=1) - within * np.mean(1 / sizes)
        return cls(
            fixed=fixed,
            drawn=drawn,
            middle=values.mean(0),
            between=np.maximum(between, _LEAST**2),
            within=within,
        )

    def deviations(self, compared: Compared) -> Floats:
        """Return by how many standard deviations patients deviate: (P, D + S + D)."""
        values = np.hstack([compared.means, _over(compared, self.fixed, self.drawn)])
        variance = self.between + self.within / np.array(compared.sizes)[:, None]
        found = (values - self.middle) / np.sqrt(variance)
        sources = len(self.fixed)
        found[:, -sources:] = np.maximum(found[:, -sources:], 0)
        return _upwards(found, sources)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return each patient's first image: (P,)."""
    return [0, *np.cumsum(sizes).tolist()][:-1]


def _upwards(deviations: Floats, count: int) -> Floats:
    """Keep of the first columns, distances, what is far; of others both sides. Unknown is 0."""
    found = np.nan_to_num(deviations)
    found[:, :count] = np.maximum(found[:, :count], 0)
    return found


def _fit_squares(logarithms: Floats, sizes: Floats) -> Floats:
    """Return the squared distance of a mean image that bag size does not, and does, divide."""
    squares = np.exp(2 * logarithms)
    weights, _ = nnls(np.column_stack([sizes, np.ones_like(sizes)]), squares * sizes)
    return np.asarray(np.maximum(weights, np.finfo(float).tiny))


def _over(compared: Compared, fixed: Floats, drawn: Floats) -> Floats:
    expected = fixed + drawn / np.array(compared.sizes)[:, None]  # (P, D)
    return np.asarray(2 * compared.of_means - np.log(expected))


def _within(training: Compared) -> Floats:
    """Return the variance of images about their patients' means: (D + S,)."""
    centred = training.values - np.repeat(training.means, training.sizes, axis=0)
    return np.asarray((centred**2).sum(0) / max(len(centred) - len(training.sizes), 1))


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
    image_range: _Range
    patient_spread: _Spread

    @classmethod
    def learn(
        cls, pooled: Sequence[Floats], statistics: pd.DataFrame | None, sizes: Sequence[int]
    ) -> "Familiarity":
        """Learn from training patients, at least `FEWEST`, with so many images each: (P,).

        `pooled` are the features of their images by each source, (N, C); `statistics` (N, S).
        """
        names = () if statistics is None else tuple(map(str, statistics))
        training = _left_out(pooled, _matrix(statistics, names, sizes), sizes)
        images, patients = _left_out_deviations(training)
        # Of n left-out patients, the value that a new one exceeds by chance: at rank .95 (n + 1).
        patient_limit = np.quantile(patients, 1 - UNLIKE_PATIENTS, method="weibull")
        return cls(
            features=tuple(FeatureDistance.learn(each) for each in pooled),
            statistics=names,
            fewest=min(sizes),
            most=max(sizes),
            image_limit=max(float(np.quantile(images, 1 - UNLIKE_IMAGES)), _SMALL),
            patient_limit=max(float(patient_limit), _SMALL),
            image_range=_Range.of(training),
            patient_spread=_Spread.of(training),
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
        unlike = (np.abs(images).max(1) > 1).astype(np.int64)  # (N,)
        count = np.add.reduceat(unlike, _starts(sizes))  # (P,)
        far = np.abs(patients).max(1)
        return Judgement(
            images=pd.DataFrame(
                {
                    "unlikeness": np.abs(images).max(1),
                    "unlike": unlike,
                    "unlike_in": [self._words(row) for row in images],
                }
            ),
            patients=pd.DataFrame(
                {
                    "unlikeness": far,
                    "unlike": (far > 1).astype(np.int64),
                    "unlike_images": count / sizes,
                }
            ),
            notes=tuple(
                self._note(*each) for each in zip(patients, count.tolist(), sizes, strict=True)
            ),
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
                "image_range": _Range(**_arrays(content["image_range"])),
                "patient_spread": _Spread(**_arrays(content["patient_spread"])),
            },
        )


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


def _left_out_deviations(training: Compared) -> tuple[Floats, Floats]:
    """Return the largest deviation of each image (N,) and patient (P,) from all other patients."""
    images, patients = [], []
    for others, own in training.each_left_out():
        images.append(np.abs(_Range.of(others).deviations(own)).max(1))
        patients.append(np.abs(_Spread.of(others).deviations(own)).max(1))
    return np.concatenate(images), np.concatenate(patients)
