"""By how much images and patients deviate from those of training, in measures of any unit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy.optimize import nnls

from lymphfeat.runtime.arrays import Floats

UNLIKE_IMAGES = 0.01  # the share of training images that are beyond their limit
_LEAST = 0.01  # in the units of every measure, a deviation that does not matter


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
        sums = np.add.reduceat(self.values, starts(self.sizes))
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
class Range:
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
class Spread:
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


def starts(sizes: Sequence[int]) -> list[int]:
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


def left_out_deviations(training: Compared) -> tuple[Floats, Floats]:
    """Return the largest deviation of each image (N,) and patient (P,) from all other patients."""
    images, patients = [], []
    for others, own in training.each_left_out():
        images.append(np.abs(Range.of(others).deviations(own)).max(1))
        patients.append(np.abs(Spread.of(others).deviations(own)).max(1))
    return np.concatenate(images), np.concatenate(patients)
