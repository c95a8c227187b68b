"""Statistics of a patient's instances, of which a linear score is taken (METHOD §2 C).

A statistic describes a patient's instances x_i (n, C) by a vector φ (D,), so that a linear score
sees how much the cells differ; no mean, maximum or top-k of scores of single instances can express
that. Each statistic also gives every instance its share of a score φ · w.

Bag size predicts the label in most cohorts, so nothing here may drift with n: quantiles are
expected values over random subsets of 16 instances, which are the same for every n ≥ 16; variances
and Gini's mean difference are unbiased. What cannot be estimated from a small bag is shrunk towards
the median of the training patients (`Spread`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from lymphfeat.heads.bags import Bags
from lymphfeat.settings import HeadSettings, require

SUBSET = 16  # instances in a random subset; the smallest bag of the challenge has as many images
_COSINES = 256  # random features of a kernel mean
_CONSTANT = 1e-12  # a standard deviation below this is none
# A channel whose spread over patients, relative to its mean and to the greatest spread of all, is
# less is dropped: it is the rounding of float32.
_VARIES = 1e-6


class Statistic(Protocol):
    """Describes bags and shares a linear score of the description out over their instances."""

    @property
    def spread(self) -> bool:
        """Whether it says how much instances differ, which a small bag does not show."""

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        """Return the statistics of bags: instances (M, C) -> (B, D), float64."""

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        """Return each instance's share of its bag's score φ · weight: (M, C), (D,) -> (M,).

        A bag's shares add up to its score, except of `LogDeviation`, whose shares are first-order.
        """

    def learnt(self) -> Mapping[str, Tensor]:
        """Return what was learnt from training patients, by name."""


# --- order statistics ----------------------------------------------------------------------------


def gini_weights(n: int) -> NDArray[np.float64]:
    """Return the weights of Gini's mean difference on n sorted values: (n,).

    The mean of |x_i − x_k| over all pairs, unbiased from n = 2; 0 for n = 1.
    """
    if n < 2:
        return np.zeros(n)
    return 2 * (2 * np.arange(1, n + 1) - n - 1) / (n * (n - 1))


def quantile_weights(n: int, level: float) -> NDArray[np.float64]:
    """Return the weights of the subset quantile at `level` (0 to 1) on n sorted values: (n,).

    The expected type-7 quantile of a random subset of 16 of them: whatever n is, this has the same
    expectation. Of fewer than 16 values it is their own quantile.
    """
    m = min(n, SUBSET)
    place = (m - 1) * level
    low = math.floor(place)
    high = min(low + 1, m - 1)
    part = place - low
    return (1 - part) * _subset_order(n, m, low + 1) + part * _subset_order(n, m, high + 1)


def _subset_order(n: int, m: int, k: int) -> NDArray[np.float64]:
    """Return the probability that the k-th smallest of m values drawn from n is the i-th: (n,)."""
    i = np.arange(1, n + 1)
    possible = (i >= k) & (n - i >= m - k)
    with np.errstate(invalid="ignore"):
        log = _log_choose(i - 1, k - 1) + _log_choose(n - i, m - k) - _log_choose(n, m)
    return np.where(possible, np.exp(np.where(possible, log, 0)), 0.0)


def _log_choose(n: NDArray[np.int64] | int, k: int) -> NDArray[np.float64]:
    n = np.asarray(n, np.float64)
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1))


@dataclass(frozen=True)
class OrderStatistic:
    """Σ a_i x_(i) per channel: fixed weights on a patient's sorted values."""

    weights: Callable[[int], NDArray[np.float64]]  # n -> (n,), of the smallest first
    spread: bool = True

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        parts = _parts(instances, bags)
        return torch.stack(
            [self._of(len(part), part) @ part.sort(dim=0).values.double() for part in parts]
        )

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        return torch.cat([self._share(part, weight) for part in _parts(instances, bags)])

    def _share(self, part: Tensor, weight: Tensor) -> Tensor:
        ranked = part.sort(dim=0, stable=True)
        own = self._of(len(part), part)[:, None] * ranked.values.double() * weight  # (n, C)
        return torch.zeros_like(own).scatter_(0, ranked.indices, own).sum(1)

    def _of(self, n: int, like: Tensor) -> Tensor:
        return torch.from_numpy(_cached(self.weights, n)).to(like.device)

    def learnt(self) -> Mapping[str, Tensor]:
        return {}


def _parts(instances: Tensor, bags: Bags) -> tuple[Tensor, ...]:
    """Cut instances (M, C) into bags, (n, C) each."""
    return torch.split(instances, bags.sizes.tolist())


@lru_cache(maxsize=4096)
def _cached(weights: Callable[[int], NDArray[np.float64]], n: int) -> NDArray[np.float64]:
    return weights(n)


@dataclass(frozen=True)
class QuantileRange:
    """The weights of the difference of two subset quantiles, such as q90 − q50."""

    high: float
    low: float

    @classmethod
    def parse(cls, text: str) -> "QuantileRange":
        """Read percents such as 90-50. Raises SettingsError."""
        try:
            high, low = (float(part) / 100 for part in text.split("-"))
        except ValueError:
            high, low = 0.0, 1.0
        require(
            0 <= low < high <= 1,
            f"quantiles (={text}) must be two percents, the higher first, such as 90-50.",
        )
        return cls(high, low)

    def __call__(self, n: int) -> NDArray[np.float64]:
        return quantile_weights(n, self.high) - quantile_weights(n, self.low)


# --- moments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """The mean of each channel."""

    spread: bool = False

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        return bags.mean(instances.double())

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        return (instances.double() @ weight) / bags.spread(bags.sizes[:, None])[:, 0]

    def learnt(self) -> Mapping[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Deviation:
    """The standard deviation s_c (n − 1) of each channel, brought to bags of 16; 0 for n = 1.

    s² is unbiased, but s is not: of sparse features it grows by a fifth from 16 to 200 instances.
    The jackknife's estimate of that bias brings larger bags to the expectation of bags of 16.
    """

    spread: bool = True

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        measured = [Deviations.of(part) for part in _parts(instances, bags)]
        return torch.stack(
            [of_bag.extrapolated(of_bag.whole, of_bag.change) for of_bag in measured]
        )

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        measured = [Deviations.of(part) for part in _parts(instances, bags)]
        return torch.cat([one.shares(lambda s: weight.expand_as(s)) for one in measured])

    def learnt(self) -> Mapping[str, Tensor]:
        return {}


@dataclass(frozen=True)
class LogDeviation:
    """log(s_c + ε_c), brought to bags of 16 as `Deviation` is.

    The shares are those of the deviations times the slope of the logarithm: first-order, so they
    do not add up to the score.
    """

    epsilon: Tensor  # (C,)
    spread: bool = True

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        return torch.stack([self.of(Deviations.of(part)) for part in _parts(instances, bags)])

    def of(self, measured: "Deviations") -> Tensor:
        """Return the statistic of one bag whose deviations are known: (C,)."""
        raised = measured.whole + self.epsilon
        return measured.extrapolated(raised.log(), torch.log1p(measured.change / raised))

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        measured = [Deviations.of(part) for part in _parts(instances, bags)]
        return torch.cat([one.shares(lambda s: weight / (s + self.epsilon)) for one in measured])

    def learnt(self) -> Mapping[str, Tensor]:
        return {"epsilon": self.epsilon}


@dataclass(frozen=True)
class Deviations:
    """A bag's standard deviations, of all its instances and without each one in turn."""

    distance: Tensor  # (n, C) of each instance from the mean
    whole: Tensor  # (C,)
    change: Tensor  # (n, C) of the deviation when one instance is left out

    @classmethod
    def of(cls, bag: Tensor) -> "Deviations":
        """Measure a bag (n, C), in float64."""
        n = len(bag)
        values = bag.double()
        distance = values - values.mean(0)
        squares = (distance**2).sum(0)  # (C,)
        whole = _root(squares / max(n - 1, 1))
        if n <= SUBSET:
            return cls(distance, whole, torch.zeros_like(distance))
        without = (squares - distance**2 * (n / (n - 1))).clamp(min=0) / (n - 2)
        return cls(distance, whole, _root(without) - whole)

    def extrapolated(self, whole: Tensor, change: Tensor) -> Tensor:
        """Bring a function of the deviations (C,), and its changes (n, C), to bags of 16: (C,).

        With bias a / n the mean change is a / (n (n − 1)), and 1 / n is to become 1 / 16.
        """
        return whole + jackknife(len(change)) * change.mean(0)

    def shares(self, slope: Callable[[Tensor], Tensor]) -> Tensor:
        """Return each instance's share of Σ_c slope_c s_c, brought to bags of 16: (n,).

        `slope` gives the weights of deviations, of any shape (…, C). s is homogeneous of degree
        one, so s = Σ_i (x_i − m)² / ((n − 1) s), and each instance has its term; likewise for the
        deviations without one instance, whose mean lies distance / (n − 1) further on.
        """
        n, d = len(self.distance), self.distance
        factor = jackknife(n)
        own = (1 - factor) * d**2 * _per_square(self.whole, slope, n - 1)
        if factor:
            each = _per_square(self.whole + self.change, slope, n - 2) * factor / n  # (n, C)
            moved = d / (n - 1)  # (n, C) of the mean, as that instance leaves
            others = [(each * moved**p).sum(0) - each * moved**p for p in range(3)]
            own = own + d**2 * others[0] + 2 * d * others[1] + others[2]
        return own.sum(1)


def _root(variance: Tensor) -> Tensor:
    """Return square roots; their gradient is 0 at 0, that is, of channels that do not vary."""
    if not variance.requires_grad:
        return variance.sqrt()
    varies = variance > 0
    return torch.where(varies, torch.where(varies, variance, 1).sqrt(), 0)


def jackknife(n: int) -> float:
    """Return what the mean change is multiplied by: n (n − 1) (1 / 16 − 1 / n)."""
    return (n - 1) * (n - SUBSET) / SUBSET if n > SUBSET else 0.0


def _per_square(deviation: Tensor, slope: Callable[[Tensor], Tensor], freedom: int) -> Tensor:
    """Return what a squared distance counts in slope · deviation; 0 where nothing varies."""
    weight = slope(deviation) / (deviation * max(freedom, 1))
    return torch.where(deviation > _CONSTANT, weight, 0)


# --- embeddings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelMean:
    """mean_i cos(x_i W / bandwidth + phase): random Fourier features of a Gaussian kernel.

    The mean embedding sees every difference of two distributions (Rahimi and Recht 2007).
    """

    directions: Tensor  # (C, D), standard normal
    phases: Tensor  # (D,), uniform in [0, 2π)
    bandwidth: Tensor  # ()
    spread: bool = False

    @classmethod
    def draw(cls, channels: int, bandwidth: float = 1.0) -> "KernelMean":
        """Draw directions and phases, which are the same for every training set."""
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(channels, _COSINES, generator=generator)
        phases = 2 * math.pi * torch.rand(_COSINES, generator=generator)
        return cls(directions, phases, torch.tensor(bandwidth))

    def with_bandwidth(self, bandwidth: Tensor) -> "KernelMean":
        """Return the same directions and phases with another bandwidth ()."""
        return replace(self, bandwidth=bandwidth)

    def project(self, instances: Tensor) -> Tensor:
        """Return instances @ directions: (M, C) -> (M, D)."""
        return instances.to(self.directions.dtype) @ self.directions.to(instances.device)

    def embed(self, projected: Tensor) -> Tensor:
        """Return cosines (M, D) of projected instances (M, D)."""
        bandwidth, phases = (each.to(projected.device) for each in (self.bandwidth, self.phases))
        return (projected / bandwidth + phases).cos()

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        return bags.mean(self.embed(self.project(instances))).double()

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        cosines = self.embed(self.project(instances)).double() @ weight  # (M,)
        return cosines / bags.spread(bags.sizes[:, None])[:, 0]

    def learnt(self) -> Mapping[str, Tensor]:
        return {"bandwidth": self.bandwidth[None]}


@dataclass(frozen=True)
class PrototypeShares:
    """The share of a bag's instances nearest to each of K prototypes."""

    centres: Tensor  # (K, C)
    spread: bool = False

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        return bags.mean(_membership(instances, self.centres))

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        own = _membership(instances, self.centres) @ weight  # (M,)
        return own / bags.spread(bags.sizes[:, None])[:, 0]

    def learnt(self) -> Mapping[str, Tensor]:
        return {"centres": self.centres}


@dataclass(frozen=True)
class PrototypeMeans:
    """The mean of a bag's instances nearest to each of K prototypes; of none, the prototype."""

    centres: Tensor  # (K, C)
    spread: bool = False

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        count, values = len(self.centres), instances.double()
        place = bags.index * count + _nearest(instances, self.centres)  # (M,) among all clusters
        sizes = torch.bincount(place, minlength=bags.n_bags * count)[:, None]  # (B · K, 1)
        total = values.new_zeros(len(sizes), values.shape[1]).index_add(0, place, values)
        empty = self.centres.double().repeat(bags.n_bags, 1)  # (B · K, C)
        means = torch.where(sizes > 0, total / sizes.clamp(min=1), empty)
        return means.view(bags.n_bags, -1)  # (B, K · C)

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        """Return the shares; the score of prototypes without instances belongs to no instance."""
        member = _membership(instances, self.centres)  # (M, K)
        counts = bags.spread(bags.sum(member).clamp(min=1))  # (M, K)
        by_prototype = instances.double() @ weight.view(len(self.centres), -1).T  # (M, K)
        return (member / counts * by_prototype).sum(1)

    def learnt(self) -> Mapping[str, Tensor]:
        return {"centres": self.centres}


def _membership(instances: Tensor, centres: Tensor) -> Tensor:
    """Return 1 for each instance's nearest centre and 0 for the others: (M, K), float64."""
    return torch.nn.functional.one_hot(_nearest(instances, centres), len(centres)).double()


def _nearest(instances: Tensor, centres: Tensor) -> Tensor:
    """Return each instance's nearest centre: (M,)."""
    values, centres = instances.float(), centres.float()
    # Squared distances but for the squared length of the instance.
    return torch.addmm((centres**2).sum(1), values, centres.T, alpha=-2).argmin(1)


# --- standardising -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standardised:
    """A statistic standardised over training patients, so that its mean square length is 1."""

    statistic: Statistic
    typical: Tensor  # (D,) the training patients' median
    mean: Tensor  # (D,)
    scale: Tensor  # (D,) 1 / (standard deviation · √D'), D' channels that vary; 0 of the others

    @classmethod
    def of(cls, statistic: Statistic, described: Tensor, sizes: Tensor) -> "Standardised":
        """Learn from training patients: described (n, D), bag sizes (n,)."""
        typical = described.quantile(0.5, dim=0)
        known = _shrunk(statistic, described, sizes, typical)
        mean, std = known.mean(0), known.std(0, correction=0)
        varies = std > _VARIES * (_VARIES + mean.abs() + std.max())
        scale = torch.where(varies, 1 / std, 0) / varies.sum().clamp(min=1).sqrt()
        return cls(statistic, typical, mean, scale)

    def apply(self, described: Tensor, sizes: Tensor) -> Tensor:
        """Standardise what was described of bags of the sizes (B,): (B, D) -> (B, D)."""
        return (_shrunk(self.statistic, described, sizes, self.typical) - self.mean) * self.scale

    def score(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        """Return the score of bags under a weight (D,) of the standardised statistic: (B,)."""
        return self.apply(self.statistic.describe(instances, bags), bags.sizes) @ weight

    def shares(self, instances: Tensor, bags: Bags, weight: Tensor) -> Tensor:
        """Return each instance's share of its bag's score: (M,).

        What belongs to no instance, the mean and the typical patient, is left out.
        """
        shares = self.statistic.shares(instances, bags, weight * self.scale)
        if self.statistic.spread:
            shares = shares * bags.spread(confidence(bags.sizes)[:, None])[:, 0]
        return shares


def _shrunk(statistic: Statistic, described: Tensor, sizes: Tensor, typical: Tensor) -> Tensor:
    if not statistic.spread:
        return described
    return torch.lerp(typical, described, confidence(sizes)[:, None])


def confidence(sizes: Tensor) -> Tensor:
    """Return how much a bag's own spread counts, 0 to 1, the rest being the typical one's: (B,).

    One instance has no spread; from 16 on it counts wholly.
    """
    return ((sizes - 1) / (SUBSET - 1)).clamp(max=1.0).double()


# Statistics that learn nothing from training patients, by name.
FIXED: Mapping[str, Callable[[HeadSettings], Statistic]] = {
    "mean": lambda settings: Mean(),
    "std": lambda settings: Deviation(),
    "gini": lambda settings: OrderStatistic(gini_weights),
    "quantiles": lambda settings: OrderStatistic(QuantileRange.parse(settings.quantiles)),
}
