"""What a step of the weighted family reads at a time, forward and then backward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from lymphfeat.heads.aggregators import closed_forms
from lymphfeat.heads.aggregators.closed_forms import Aggregated
from lymphfeat.heads.aggregators.weighted import AggregatorState
from lymphfeat.heads.engine.scorers import score_rows
from lymphfeat.heads.engine.trainer import runs
from lymphfeat.heads.registry import WeightedAggregator, aggregator_of
from lymphfeat.settings import HeadSettings

Folded = tuple[Tensor, Tensor]  # scorers of raw features: weight (H, C), bias (H,)
Numbers = NDArray[np.int64]
Parts = Sequence[tuple[WeightedAggregator, slice]]  # an aggregator, and its heads among K


class Kinds:
    """The aggregators of H heads, and the order of heads in which each has neighbours."""

    def __init__(self, heads: Sequence[HeadSettings]) -> None:
        kinds = [aggregator_of(head, WeightedAggregator) for head in heads]
        # Last those whose gradient is of one instance: the others' take one product together.
        self._kinds = sorted(dict.fromkeys(kinds), key=_is_max)
        self.ranks = np.array([self._kinds.index(kind) for kind in kinds])  # (H,)

    def sorted(self, columns: Numbers) -> Numbers:
        """Sort heads by aggregator."""
        return columns[np.argsort(self.ranks[columns], kind="stable")]

    def parts(self, columns: Numbers) -> Parts:
        """Cut sorted heads (K,) into those of each aggregator."""
        ranks = self.ranks[columns].tolist()
        return [(self._kinds[ranks[own.start]], own) for own in runs(ranks)]


def _is_max(kind: WeightedAggregator) -> bool:
    return kind.closed_form is closed_forms.highest


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """The losses of some heads and their gradients by the folded scorers."""

    columns: Tensor  # (K,) the heads
    weight: Tensor  # (K, C)
    others: Tensor  # (5, K): loss, and by bias, gamma and beta; patients seen

    @classmethod
    def zeros(cls, weight: Tensor) -> "Slopes":
        """Take the weight (H, C) of all heads."""
        n = len(weight)
        columns = torch.arange(n, device=weight.device)
        return cls(columns=columns, weight=torch.zeros_like(weight), others=weight.new_zeros(5, n))

    def add(self, found: "Slopes") -> None:
        """Add those of some heads to those of all."""
        self.weight.index_add_(0, found.columns, found.weight)
        self.others.index_add_(1, found.columns, found.others)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Patients that K heads need in a step."""

    instances: Callable[[], Tensor]  # (m, C), of one patient after another
    sizes: Sequence[int]  # (b,) instances of each
    patients: Tensor  # (b,) rows
    columns: Tensor  # (K,) the heads, sorted by aggregator
    parts: Parts
    batch: Tensor  # (K,) patients in the batch of each head

    @cached_property
    def runs(self) -> Sequence[tuple[slice, slice]]:
        """Neighbours of one size: which patients, and their instances."""
        return list(even_runs(self.sizes))

    def logits(self, folded: Folded) -> Tensor:
        """Score the instances: (K, m)."""
        weight, bias = folded
        return score_rows(self.instances(), weight[self.columns], bias[self.columns])

    def slopes(
        self, state: AggregatorState, logits: Tensor, labels: Tensor, counts: Tensor
    ) -> Slopes:
        """Return the losses and their gradients, given logits (K, m).

        Patients have labels (b,), and count as much as `counts` (K, b) says in a head's loss.
        """
        instances = self.instances()
        weight = torch.zeros(len(logits), instances.shape[1], device=logits.device)  # (K, C)
        others = logits.new_zeros(5, len(logits))
        by_logit = torch.empty_like(logits)  # (K, m)
        for kind, part in self.parts:
            own = state.columns(self.columns[part])
            for bags, rows in self.runs:
                n = bags.stop - bags.start
                values = logits[part, rows]  # (k, n · u)
                found = kind.aggregate(own, values.reshape(len(values), n, -1))
                slope, of_bags = _losses(found, labels[bags], counts[part, bags])
                others[:, part] += of_bags
                if found.weights is not None:
                    by_logit[part, rows] = (found.weights * slope[..., None]).flatten(1)
                else:
                    weight[part] += _of_chosen(instances[rows], found, slope)
        dense = slice(0, next((part.start for kind, part in self.parts if _is_max(kind)), None))
        weight[dense] = (by_logit[dense].to(instances.dtype) @ instances).float()
        return Slopes(columns=self.columns, weight=weight, others=others)


def _losses(found: Aggregated, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return d loss / d patient logit (k, n), and sums over patients: (5, k), as in `Slopes`.

    The loss is the cross-entropy of labels (n,), times counts (k, n).
    """
    total = found.total
    losses = (softplus(total) - labels * total) * counts
    slope = (total.sigmoid() - labels) * counts
    sums = [losses.sum(1), slope.sum(1)]
    for by in (found.gamma, found.beta):
        sums.append(torch.zeros_like(sums[0]) if by is None else (slope * by).sum(1))
    return slope, torch.stack([*sums, torch.full_like(sums[0], total.shape[1])])


def _of_chosen(instances: Tensor, found: Aggregated, slope: Tensor) -> Tensor:
    """Return the gradient (k, C) where a single instance (n · u, C) of each patient counts."""
    assert found.chosen is not None
    n = slope.shape[1]
    starts = torch.arange(n, device=slope.device) * (len(instances) // n)
    chosen = instances[starts + found.chosen].float()  # (k, n, C)
    return torch.einsum("kn,knc->kc", slope, chosen)


def even_runs(sizes: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield neighbouring bags of one size: which they are, and their instances."""
    ends = [0, *accumulate(sizes)]
    for bags in runs(sizes):
        yield bags, slice(ends[bags.start], ends[bags.stop])
