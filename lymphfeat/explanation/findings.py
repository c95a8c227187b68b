"""What a head of the family `distribution` found in each patient, statistic by statistic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.explanation.subjects import Subject
from lymphfeat.heads.aggregators.distribution import (
    Deviation,
    KernelMean,
    LogDeviation,
    Mean,
    OrderStatistic,
    PrototypeMeans,
    QuantileRange,
    Standardised,
    Statistic,
    confidence,
)
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.exact_head import Block, ExactHead

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one statistic of a head says of every patient.

    A statistic is standardised over training patients, so the average one scores 0: the intercept
    and a patient's scores add up to its logit.
    """

    about: str  # what the statistic looks at, as the subject of a sentence
    spread: bool  # whether that is how much cells differ
    score: Doubles  # (P,) of the patient's logit, compared with the average training patient
    differing: Doubles  # (P,) share of the features in which cells differ more than the median
    # training patient's; NaN where that is not known (a single image, or no `spread`)
    certain: Doubles  # (P,) how much the patient's own statistic counts, 0 to 1; the rest is the
    # median training patient's, of small bags and a `spread`
    slope: float  # of the logit, as all features rise by a standard deviation of training patients


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a head found in patients."""

    intercept: float  # the logit of the average training patient
    statistics: tuple[Finding, ...]
    distance: Doubles | None  # (N,) of each image from its patient's average cell, 1 on average;
    # None where the head does not read how much cells differ

    @property
    def total(self) -> Doubles:
        """Return the patients' logits by the head: (P,)."""
        return np.asarray(self.intercept + np.sum([each.score for each in self.statistics], axis=0))

    @classmethod
    def of(
        cls, subject: Subject, kept: Sequence[Tensor], sizes: NDArray[np.int64]
    ) -> "Findings | None":
        """Measure patients of `sizes` (P,) images, by what each head keeps of them (N, U, C).

        Of the same head in several members, the mean. None unless all heads are one of the family
        `distribution`, and each reads one backbone.
        """
        heads = [reader.head for reader in subject.readers]
        exact = [head.exact for head in heads if isinstance(head, DistributionHead)]
        if len(exact) < len(heads) or len(subject.heads) > 1 or subject.joint:
            return None
        with torch.no_grad():
            images = Bags.of(sizes)
            found = [cls.of_head(h, own, images) for h, own in zip(exact, kept, strict=True)]
        return found[0] if len(found) == 1 else cls._mean(found)

    @classmethod
    def _mean(cls, members: "Sequence[Findings]") -> "Findings":
        distances = [each.distance for each in members if each.distance is not None]
        return cls(
            intercept=float(np.mean([each.intercept for each in members])),
            statistics=tuple(
                _mean_finding(each)
                for each in zip(*(each.statistics for each in members), strict=True)
            ),
            distance=np.mean(distances, axis=0) if distances else None,
        )

    @classmethod
    def of_head(cls, head: ExactHead, kept: Tensor, images: Bags) -> "Findings":
        """Measure patients from the instances (N, U, C) of their images."""
        instances, bags = kept.flatten(0, 1), images.times(kept.shape[1])
        spread = any(block.statistic.statistic.spread for block in head.blocks)
        distance = cell_distances(head, instances, bags).view(kept.shape[:2]).mean(1)
        return cls(
            intercept=float(head.intercept),
            statistics=tuple(_find(head, block, instances, bags) for block in head.blocks),
            distance=distance.numpy() if spread else None,
        )


def _mean_finding(members: Sequence[Finding]) -> Finding:
    def mean(name: str) -> Doubles:
        return np.asarray(np.mean([getattr(each, name) for each in members], axis=0))

    return replace(
        members[0],
        score=mean("score"),
        differing=mean("differing"),
        certain=mean("certain"),
        slope=float(mean("slope")),
    )


def _find(head: ExactHead, block: Block, instances: Tensor, bags: Bags) -> Finding:
    own = block.statistic
    described = own.statistic.describe(instances, bags)  # (P, D)
    varies = own.scale > 0  # (D,)
    slope = block.weight[varies].sum() / varies.sum().clamp(min=1).sqrt()
    return Finding(
        about=_about(own.statistic, "cell" if head.settings.unit == "image" else "pixel"),
        spread=own.statistic.spread,
        score=(own.apply(described, bags.sizes) @ block.weight).numpy(),
        certain=(
            confidence(bags.sizes) if own.statistic.spread else torch.ones(bags.n_bags)
        ).numpy(),
        differing=_differing(own, described[:, varies], own.typical[varies], bags),
        slope=float(slope),
    )


def _differing(own: Standardised, described: Tensor, typical: Tensor, bags: Bags) -> Doubles:
    """Return the share of features (P, D) above the typical; equal ones count half."""
    above = (described > typical).double() + 0.5 * (described == typical).double()
    known = (bags.sizes > 1) & own.statistic.spread & (above.shape[1] > 0)
    return torch.where(known, above.mean(1), torch.nan).numpy()


def _about(statistic: Statistic, instance: str) -> str:
    match statistic:
        case Mean():
            return f"the average appearance of the {instance}s"
        case Deviation():
            return f"how much the {instance}s differ from their average"
        case LogDeviation():
            return f"how much the {instance}s differ from their average, on a logarithmic scale"
        case OrderStatistic(weights=QuantileRange(high=high, low=low)):
            levels = f"{100 * high:g} % and {100 * low:g} %"
            return f"the distance between the {levels} quantiles of the {instance}s"
        case OrderStatistic():
            return f"the average difference of two {instance}s"
        case KernelMean():
            return f"the distribution of the {instance}s' appearances"
        case PrototypeMeans():
            return f"the average appearance of each kind of {instance}"
        case _:
            return f"the share of each kind of {instance}"


# --- how far a cell is from the patient's average cell --------------------------------------------


def cell_distances(head: ExactHead, instances: Tensor, bags: Bags) -> Tensor:
    """Measure how far each instance (M, C) is from the mean of its patient's: (M,), float64.

    The sum of absolute differences of the features, each weighed by how strongly the head reads the
    spread of that feature, by its size whatever its sign: so no difference cancels another. In
    units of the patient's mean distance; 0 where all are alike.
    """
    blocks = [block for block in head.blocks if block.statistic.statistic.spread]
    strength = _strength(blocks, instances.shape[1])
    parts = torch.split(instances, bags.sizes.tolist())
    return torch.cat([_distances(part.double(), strength) for part in parts])


def _distances(cells: Tensor, strength: Tensor) -> Tensor:
    away = (cells - cells.mean(0)).abs() @ strength  # (n,)
    return away / away.mean() if away.any() else away


def _strength(blocks: Sequence[Block], channels: int) -> Tensor:
    """Return how much the logit changes as the spread of each feature grows by one: (C,)."""
    strength = torch.zeros(channels, dtype=torch.float64)
    for block in blocks:
        own = (block.weight * block.statistic.scale).abs()
        if isinstance(block.statistic.statistic, LogDeviation):
            own = own * (-block.statistic.typical).exp()  # the slope of a logarithm
        strength += own
    return strength
