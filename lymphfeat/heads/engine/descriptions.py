"""Statistics of all patients, learnt and standardised for one training set after another.

What needs no training set (variances, sorted values, projections) is computed once for all of them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lymphfeat.heads.aggregators.distribution import (
    Deviation,
    Deviations,
    KernelMean,
    LogDeviation,
    Mean,
    OrderStatistic,
    PrototypeMeans,
    PrototypeShares,
    QuantileRange,
    Statistic,
    gini_weights,
)
from lymphfeat.heads.engine.instances import Instances
from lymphfeat.heads.registry import DistributionAggregator, aggregator_of
from lymphfeat.settings import HeadSettings, require

_PAIRS = 1 << 14  # of instances, whose median distance is the kernel's bandwidth
_CLUSTERED = 1 << 12  # instances, at most, whose clusters are the prototypes
_HUGE = 1e30


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
    """Logarithms of standard deviations; ε_c is a tenth of the training patients' mean."""

    def __init__(self, instances: Instances) -> None:
        """Measure the deviations of all patients."""
        measured = [
            Deviations.of(bag)
            for _, values, bags in instances.chunks(1)
            for bag in torch.split(values, bags.sizes.tolist())
        ]
        self._deviations = torch.stack([of_bag.whole for of_bag in measured])  # (P, C)
        # Changes are small, so float32 is precise, and its logarithms are fast.
        self._measured = [replace(one, change=one.change.float()) for one in measured]

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        epsilon = 0.1 * self._deviations[train].mean(0)
        # Where no instance of the training patients differs there is no scale; a huge one makes
        # the channel constant, and so drops it.
        learnt = LogDeviation(torch.where(epsilon > 0, epsilon, _HUGE))
        return [(learnt, torch.stack([learnt.of(one) for one in self._measured]))]


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
        first, second = (instances.pick(rows, None).float() for rows in pairs)
        self._distances = (first - second).norm(dim=1)  # (pairs,)
        self._patients = instances.bags.index[pairs.to(instances.device)]  # (2, pairs)

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        known = torch.isin(self._patients, train).all(0) & (self._patients[0] != self._patients[1])
        learnt = self._kernel.with_bandwidth(self._distances[known].median())
        values = [bags.mean(learnt.embed(projected)) for projected, bags in self._chunks]
        return [(learnt, torch.cat(values).double())]


@dataclass(frozen=True)
class Prototypes:
    """K clusters of the training patients' instances."""

    instances: Instances
    count: int

    def learn(self, train: Tensor) -> list[tuple[Statistic, Tensor]]:
        rows = torch.cat([self._rows_of(int(patient)) for patient in train.sort().values])
        if len(rows) > _CLUSTERED:
            generator = torch.Generator().manual_seed(0)
            rows = rows[torch.randperm(len(rows), generator=generator)[:_CLUSTERED]]
        values = self.instances.pick(rows, None).float().cpu().numpy()
        found = KMeans(min(self.count, len(values)), n_init=1, random_state=0).fit(values)
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
            for place in self._places(name, head)
        ]

    def _places(self, name: str, head: HeadSettings) -> Sequence[int]:
        _, marked, number = name.partition("@")
        if not marked:
            return range(len(self.sets))
        require(
            number.isdecimal() and 1 <= int(number) <= len(self.sets),
            f"agg (={head.agg}) must name one of the {len(self.sets)} stores after @, counted from "
            f"1; got {number or 'none'}.",
        )
        return [int(number) - 1]

    def _make(self, name: str, place: int, head: HeadSettings) -> Description:
        key = (name, place, head.quantiles, head.prototypes)
        if key not in self._made:
            self._made[key] = _MAKERS[name](self.sets[place], head)
        return self._made[key]


def _quantiles(instances: Instances, settings: HeadSettings) -> Description:
    return Fixed.of(instances, OrderStatistic(QuantileRange.parse(settings.quantiles)))


_MAKERS: Mapping[str, Callable[[Instances, HeadSettings], Description]] = {
    "mean": lambda instances, settings: Fixed.of(instances, Mean()),
    "std": lambda instances, settings: Fixed.of(instances, Deviation()),
    "logstd": lambda instances, settings: LogDeviations(instances),
    "gini": lambda instances, settings: Fixed.of(instances, OrderStatistic(gini_weights)),
    "quantiles": _quantiles,
    "kernel-mean": lambda instances, settings: KernelMeans(instances),
    "prototypes": lambda instances, settings: Prototypes(instances, settings.prototypes),
}
