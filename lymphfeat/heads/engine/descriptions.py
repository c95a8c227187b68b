"""Statistics of all patients, learnt and standardised for one training set after another.

What needs no training set (variances, sorted values, projections) is computed once for all of them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lymphfeat.heads.aggregators.distribution import (
    FIXED,
    Deviations,
    KernelMean,
    LogDeviation,
    PrototypeMeans,
    PrototypeShares,
    Statistic,
    jackknife,
)
from lymphfeat.heads.engine.instances import Instances
from lymphfeat.heads.registry import DistributionAggregator, aggregator_of, places_of
from lymphfeat.settings import HeadSettings, require

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

_PAIRS = 1 << 14  # of instances, whose median distance is the kernel's bandwidth
_FEW_PAIRS = 1 << 8  # too few for a median
_CLUSTERED = 1 << 12  # instances, at most, whose clusters are the prototypes
_HUGE = 1e30
_SMALL_CHANGE, _TERMS = 0.1, 8  # of a series whose error is below .1 ** 9 / 9 for each instance


class Description(Protocol):
    """A statistic of all patients before a training set is known."""

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        """Learn from training patients (n,); return statistics, each with all patients' (P, D)."""


@dataclass(frozen=True)
class Fixed:
    """A statistic that learns nothing."""

    statistic: Statistic
    values: Tensor  # (P, D)

    @classmethod
    def of(cls, instances: Instances, statistic: Statistic) -> "Fixed":
        """Describe all patients."""
        return cls(statistic, _describe(instances, statistic))

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        return [(self.statistic, self.values)]


class LogDeviations:
    """Logarithms of standard deviations; ε_c is a tenth of the training patients' mean.

    Bringing them to bags of 16 takes, for every ε, Σ_i log(1 + change_i / (s + ε)) over a patient's
    instances. Nearly all changes are small against s: their sum is a power series in s / (s + ε),
    whose coefficients are made once. The others are kept one by one.
    """

    def __init__(self, instances: Instances) -> None:
        """Measure the deviations of all patients."""
        changes = [
            _Changes.of(Deviations.of(bag))
            for _, values, bags in instances.chunks(1)
            for bag in torch.split(values, bags.sizes.tolist())
        ]
        self._deviations = torch.stack([one.whole for one in changes])  # (P, C)
        self._series = torch.stack([one.series for one in changes], 1)  # (terms, P, C)
        self._large = torch.cat([one.large for one in changes])  # (m,)
        channels = self._deviations.shape[1]
        places = [patient * channels + one.channels for patient, one in enumerate(changes)]
        self._places = torch.cat(places)  # (m,) in (P, C), flat
        factors = [jackknife(n) / n for n in instances.bags.sizes.tolist()]
        self._factors = self._deviations.new_tensor(factors)[:, None]  # (P, 1)

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        epsilon = 0.1 * self._deviations[train].mean(0)
        # Where no instance of the training patients differs there is no scale; a huge one makes
        # the channel constant, and so drops it.
        epsilon = torch.where(epsilon > 0, epsilon, _HUGE)
        raised = self._deviations + epsilon  # (P, C)
        values = raised.log() + self._factors * self._log_changes(self._deviations / raised)
        return [(LogDeviation(epsilon), values)]

    def _log_changes(self, part: Tensor) -> Tensor:
        """Return Σ_i log(1 + change_i · part / s) of every patient and channel: (P, C)."""
        total = torch.zeros_like(part)
        for terms in self._series.flip(0):
            total = (total + terms) * part
        large = torch.log1p(self._large * part.flatten()[self._places])
        return total.flatten().index_add_(0, self._places, large).view_as(part)


@dataclass(frozen=True)
class _Changes:
    """How a bag's deviations change, relative to themselves, when one instance is left out."""

    whole: Tensor  # (C,) the deviations
    series: Tensor  # (terms, C): (−1)^(k + 1) / k · Σ_i change_i^k over the small ones
    large: Tensor  # (m,)
    channels: Tensor  # (m,) of the large ones

    @classmethod
    def of(cls, measured: Deviations) -> "_Changes":
        relative = measured.change / torch.where(measured.whole > 0, measured.whole, 1)  # (n, C)
        is_large = relative.abs() > _SMALL_CHANGE
        small = torch.where(is_large, 0, relative)
        series, power = [], torch.ones_like(small)
        for k in range(1, _TERMS + 1):
            power = power * small
            series.append((-1) ** (k + 1) / k * power.sum(0))
        return cls(
            measured.whole, torch.stack(series), relative[is_large], is_large.nonzero()[:, 1]
        )


class KernelMeans:
    """Mean embeddings; the bandwidth is the median distance of training patients' instances."""

    def __init__(self, instances: Instances) -> None:
        """Project all instances, and measure distances between random pairs of them."""
        self._kernel = KernelMean.draw(instances.channels)
        self._chunks = [
            (self._kernel.project(values), bags) for _, values, bags in instances.chunks(1)
        ]
        generator = torch.Generator().manual_seed(0)
        pairs = torch.randint(instances.n_instances, (2, _PAIRS), generator=generator)
        self._instances = instances
        self._distances = self._measure(pairs)  # (pairs,)
        self._patients = instances.bags.index[pairs.to(instances.device)]  # (2, pairs)

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        known = torch.isin(self._patients, train).all(0) & (self._patients[0] != self._patients[1])
        distances = self._distances[known]
        if len(distances) < _FEW_PAIRS:  # few of the store's patients are training patients
            distances = self._among(train)
        median = distances.median()
        learnt = self._kernel.with_bandwidth(torch.where(median > 0, median, 1))
        values = [bags.mean(learnt.embed(projected)) for projected, bags in self._chunks]
        return [(learnt, torch.cat(values).double())]

    def _among(self, train: Tensor) -> Tensor:
        """Return distances (pairs,) between random instances of two training patients each."""
        generator = torch.Generator().manual_seed(0)
        one = torch.randint(len(train), (_PAIRS,), generator=generator)
        away = torch.randint(1, len(train), (_PAIRS,), generator=generator)
        patients = train.cpu()[torch.stack([one, (one + away) % len(train)])]  # (2, pairs)
        ends = torch.from_numpy(self._instances.images) * self._instances.per_image
        place = torch.rand(patients.shape, generator=generator, dtype=torch.float64)
        first, last = ends[patients], ends[patients + 1]
        return self._measure(first + (place * (last - first)).long())

    def _measure(self, pairs: Tensor) -> Tensor:
        """Return the distances (n,) of instances by their rows (2, n)."""
        first, second = (self._instances.pick(rows, None).float() for rows in pairs)
        distances: Tensor = (first - second).norm(dim=1)
        return distances


@dataclass(frozen=True)
class Prototypes:
    """K clusters of the training patients' instances."""

    instances: Instances
    count: int
    cluster: "type[KMeans]"

    @classmethod
    def of(cls, instances: Instances, count: int) -> "Prototypes":
        from sklearn.cluster import KMeans  # slow: only prototypes wait for it

        return cls(instances, count, KMeans)

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        rows = torch.cat([self._rows_of(int(patient)) for patient in train.sort().values])
        if len(rows) > _CLUSTERED:
            generator = torch.Generator().manual_seed(0)
            rows = rows[torch.randperm(len(rows), generator=generator)[:_CLUSTERED]]
        values = self.instances.pick(rows, None).float().cpu().numpy()
        require(
            self.count <= len(values),
            f"prototypes (={self.count}) must be at most the number of training instances; got "
            f"{len(values)}.",
        )
        # Few iterations predict as well as convergence; centres that are not their clusters' means,
        # as mini-batches give, would show bag size (docs/heads.md).
        found = self.cluster(self.count, n_init=1, max_iter=5, random_state=0).fit(values)
        centres = torch.from_numpy(found.cluster_centers_).to(self.instances.device)
        learnt: list[Statistic] = [PrototypeShares(centres), PrototypeMeans(centres)]
        return [(statistic, _describe(self.instances, statistic)) for statistic in learnt]

    def _rows_of(self, patient: int) -> Tensor:
        first, last = self.instances.images[patient : patient + 2] * self.instances.per_image
        return torch.arange(int(first), int(last))


def _describe(instances: Instances, statistic: Statistic) -> Tensor:
    """Return a statistic of all patients: (P, D), float64."""
    parts = [statistic.describe(values, bags) for _, values, bags in instances.chunks(1)]
    return torch.cat(parts)


class Descriptions:
    """The statistics of all patients in one or several sets of features, each made once."""

    def __init__(self, sets: Sequence[Instances]) -> None:
        """Take the instances of one unit in every set."""
        self.sets = tuple(sets)
        self._made: dict[Hashable, Description] = {}

    def of(self, head: HeadSettings) -> list[tuple[int, Description]]:
        """Return the statistics of a head, each with the place of the set that it reads.

        Raises SettingsError for a store that does not exist.
        """
        statistics = aggregator_of(head, DistributionAggregator).statistics
        return [
            (place, self._make(name.partition("@")[0], place, head))
            for name in statistics
            for place in places_of(name, len(self.sets))
        ]

    def _make(self, name: str, place: int, head: HeadSettings) -> Description:
        key = (name, place, head.quantiles, head.prototypes)
        if key not in self._made:
            instances = self.sets[place]
            self._made[key] = (
                Fixed.of(instances, FIXED[name](head))
                if name in FIXED
                else _LEARNT[name](instances, head)
            )
        return self._made[key]


_LEARNT: Mapping[str, Callable[[Instances, HeadSettings], Description]] = {
    "logstd": lambda instances, settings: LogDeviations(instances),
    "kernel-mean": lambda instances, settings: KernelMeans(instances),
    "prototypes": lambda instances, settings: Prototypes.of(instances, settings.prototypes),
}
