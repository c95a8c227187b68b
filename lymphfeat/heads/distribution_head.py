"""The head of a model that scores statistics of a patient's instances (METHOD §2 C)."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from lymphfeat.heads.aggregators.distribution import (
    FIXED,
    KernelMean,
    LogDeviation,
    PrototypeMeans,
    PrototypeShares,
    Standardised,
    Statistic,
)
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.exact_head import Block, ExactHead
from lymphfeat.heads.head import Head, ReadOut
from lymphfeat.heads.registry import DistributionAggregator, aggregator_of, places_of
from lymphfeat.settings import HeadSettings


class DistributionHead(Head):
    """An `ExactHead` as a module, float64: weights and intercept are trained, the rest stays."""

    intercept: Tensor
    penalty: Tensor
    mixture: Tensor

    def __init__(self, exact: ExactHead, channels: Sequence[int] = ()) -> None:
        """Take a head, whose tensors are copied.

        Instances of several sets of features come side by side, each with its number of `channels`.
        """
        super().__init__()
        self.settings, self._channels = (exact.settings,), list(channels)
        self.blocks = nn.ModuleList(_BlockTensors(block) for block in exact.blocks)
        self.intercept = nn.Parameter(exact.intercept.clone())  # ()
        self.register_buffer("penalty", _float64(exact.penalty))  # ()
        self.register_buffer("mixture", _float64(exact.mixture))  # (blocks,)

    @classmethod
    def empty(cls, settings: HeadSettings, *channels: int) -> "DistributionHead":
        """Make a head with room for what a head of these settings has learnt, on these channels."""
        names = aggregator_of(settings, DistributionAggregator).statistics
        blocks = tuple(
            _empty_block(place, statistic, channels[place])
            for name in names
            for place in places_of(name, len(channels))
            for statistic in _blank(name.partition("@")[0], channels[place], settings)
        )
        exact = ExactHead(settings, blocks, _float64(0), 0.0, (0.0,) * len(blocks))
        return cls(exact, channels)

    @property
    def exact(self) -> ExactHead:
        """The head as its formulas take it; it shares the tensors, gradients pass through."""
        blocks = tuple(part.block for part in self.blocks if isinstance(part, _BlockTensors))
        penalty, mixture = float(self.penalty), tuple(self.mixture.tolist())
        return ExactHead(self.settings[0], blocks, self.intercept, penalty, mixture)

    def keep(self, instances: Tensor) -> Tensor:
        return instances

    def patient_logits(self, kept: Tensor, images: Bags) -> Tensor:
        return self.exact.patient_logits(self._sets(kept, images)).to(kept.dtype)

    @torch.no_grad()
    def patient_probability(self, kept: Tensor, images: Bags) -> Tensor:
        return self.exact.patient_logits(self._sets(kept, images)).sigmoid().to(kept.dtype)

    @torch.no_grad()
    def read_out(self, kept: Tensor, images: Bags) -> ReadOut:
        sets, exact = self._sets(kept, images), self.exact
        total = exact.patient_logits(sets)  # (P,)
        contribution = exact.shares(sets).view(kept.shape[:2]).sum(1)  # (N,)
        score = _centred(contribution * images.spread(images.sizes[:, None])[:, 0], total, images)
        return ReadOut(
            probability=total.sigmoid().to(kept.dtype),
            total=total.to(kept.dtype),
            score=score.to(kept.dtype),
            weight=_relative_size(contribution, images).to(kept.dtype),
            contribution=contribution.to(kept.dtype),
        )

    def _sets(self, kept: Tensor, images: Bags) -> list[tuple[Tensor, Bags]]:
        """Return each set's instances (N · U, C), and the patients they are of."""
        bags = images.times(kept.shape[1])
        flat = kept.flatten(0, 1)
        parts = torch.split(flat, self._channels, dim=1) if self._channels else (flat,)
        return [(part, bags) for part in parts]


def _centred(score: Tensor, total: Tensor, images: Bags) -> Tensor:
    """Shift the scores (N,) of each patient's images so that their mean is its logit (P,).

    A share is what an image adds to the statistics themselves, not to how far they are from the
    average training patient's: without the constants all spread that counts as reactive would look
    reactive, in tumoral patients, too.
    """
    shift = total[:, None] - images.mean(score[:, None])  # (P, 1)
    return score + images.spread(shift)[:, 0]


def _relative_size(contribution: Tensor, images: Bags) -> Tensor:
    """Return each image's part of its patient's absolute contributions; equal if all are 0."""
    size = contribution.abs()[:, None]  # (N, 1)
    total = images.spread(images.sum(size))
    equal = 1 / images.spread(images.sizes[:, None]).to(size.dtype)
    return torch.where(total > 0, size / total, equal)[:, 0]


class _BlockTensors(nn.Module):
    """The tensors of a block."""

    weight: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._place, self._statistic = block.features, block.statistic.statistic
        self.weight = nn.Parameter(block.weight.clone())  # (D,)
        for name, value in _constants(block.statistic).items():
            self.register_buffer(name, value.clone())

    @property
    def block(self) -> Block:
        """The block that has these tensors."""
        constants = dict(self.named_buffers())
        known = {name: constants.pop(name) for name in ("typical", "mean", "scale")}
        statistic: Statistic = replace(self._statistic, **constants)  # type: ignore[type-var]
        return Block(self._place, Standardised(statistic, **known), self.weight)


def _constants(standardised: Standardised) -> dict[str, Tensor]:
    """Return the tensors of a statistic and of its standardising, by the names of their fields."""
    return {
        field.name: getattr(part, field.name)
        for part in (standardised, standardised.statistic)
        for field in fields(part)  # type: ignore[arg-type]
        if isinstance(getattr(part, field.name), Tensor)
    }


def _blank(name: str, channels: int, settings: HeadSettings) -> Sequence[Statistic]:
    """Return statistics with room for what they learn, one for each block of a name."""
    if name in FIXED:
        return [FIXED[name](settings)]
    if name == "logstd":
        return [LogDeviation(_float64([0.0] * channels))]
    if name == "kernel-mean":
        return [KernelMean.draw(channels)]
    centres = torch.zeros(settings.prototypes, channels)
    return [PrototypeShares(centres), PrototypeMeans(centres.clone())]


def _empty_block(place: int, statistic: Statistic, channels: int) -> Block:
    described = statistic.describe(torch.zeros(1, channels), Bags.of([1]))  # (1, D)
    zeros = torch.zeros_like(described[0], dtype=torch.float64)
    return Block(place, Standardised(statistic, zeros, zeros, zeros), zeros)


def _float64(values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
