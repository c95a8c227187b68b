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
from lymphfeat.heads.aggregators.weighted import AggregatorState
from lymphfeat.heads.engine.scorers import score_rows
from lymphfeat.heads.engine.trainer import runs
from lymphfeat.heads.registry import WeightedAggregator, aggregator_of
from lymphfeat.settings import HeadSettings

Folded = tuple[Tensor, Tensor]  # scorers of raw features: weight (H, C), bias (H,)
Numbers = NDArray[np.int64]
Moments = Sequence[tuple[Tensor, Tensor]]  # heads (k,); their logits' number, mean, variance (3, k)
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
        own = weight.index_select(0, self.columns)
        return score_rows(self.instances(), own, bias.index_select(0, self.columns))

    def moments(self, logits: Tensor) -> Moments:
        """Return what heads that normalise logits (K, m) need of them."""
        found = []
        for kind, part in self.parts:
            if "running_mean" in kind.learns:
                own = logits[part]
                mean = own.mean(1)
                variance = (own - mean[:, None]).square().mean(1)  # faster than `torch.var_mean`
                n = torch.full_like(mean, own.shape[1])
                found.append((self.columns[part], torch.stack([n, mean, variance])))
        return found

    def slopes(
        self, state: AggregatorState, logits: Tensor, labels: Tensor, counts: Tensor
    ) -> Slopes:
        """Return the losses and their gradients, given logits (K, m).

        Patients have labels (b,), and count as much as `counts` (K, b) says in a head's loss.
        """
        (total, gamma, beta), weights, chosen = self._aggregated(state, logits)
        loss = (softplus(total) - labels * total) * counts  # (K, b)
        slope = (total.sigmoid() - labels) * counts
        dense = next((part.start for kind, part in self.parts if _is_max(kind)), len(logits))
        for bags, rows in self.runs:
            own = torch.unflatten(weights[:dense, rows], 1, (bags.stop - bags.start, -1))
            own *= slope[:dense, bags, None]
        instances = self.instances()
        weight = (weights[:dense].to(instances.dtype) @ instances).float()  # (K, C)
        if dense < len(logits):
            single = instances[chosen[dense:]].float()  # (k, b, C)
            weight = torch.cat([weight, torch.einsum("kb,kbc->kc", slope[dense:], single)])
        others = torch.stack([loss, slope, slope * gamma, slope * beta, torch.ones_like(loss)])
        return Slopes(columns=self.columns, weight=weight, others=others.sum(2))

    def _aggregated(self, state: AggregatorState, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the patients' logits and their derivatives by gamma and beta: (3, K, b); those by
        the instances' logits (K, m); and, of heads to which one instance counts, its row (K, b).
        """
        by_patient = logits.new_zeros(3, len(logits), len(self.sizes))
        weights, chosen = torch.empty_like(logits), self.columns.new_empty(by_patient.shape[1:])
        for kind, part in self.parts:
            own = state.columns(self.columns[part])
            for bags, rows in self.runs:
                n = bags.stop - bags.start
                values = torch.unflatten(logits[part, rows], 1, (n, -1))  # (k, n, u)
                found = kind.aggregate(own, values)
                its = found.total, found.gamma, found.beta
                for everyone, some in zip(by_patient, its, strict=True):
                    if some is not None:
                        everyone[part, bags] = some
                if found.weights is not None:
                    weights[part, rows] = found.weights.flatten(1)
                if found.chosen is not None:
                    starts = torch.arange(n, device=chosen.device) * values.shape[2]
                    chosen[part, bags] = found.chosen + rows.start + starts
        return by_patient, weights, chosen


def even_runs(sizes: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield neighbouring bags of one size: which they are, and their instances."""
    ends = [0, *accumulate(sizes)]
    for bags in runs(sizes):
        yield bags, slice(ends[bags.start], ends[bags.stop])
