"""Heads of the family `distribution`, solved exactly: all splits and penalties together.

A head is an L2 logistic regression on blocks of statistics (METHOD §2 C). Each block is
standardised over its training patients and divided by the square root of its length, so blocks
weigh alike. The penalty is chosen by the training patients' left-out log loss: every training set,
outer or inner, chooses its own, from its own patients.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from lymphfeat.heads.aggregators.distribution import Standardised
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.descriptions import Description, Descriptions
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.logistic import PENALTIES, solve_paths
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.engine.trainer import HeadTrainer
from lymphfeat.heads.exact_head import Block, ExactHead
from lymphfeat.heads.stack import class_weights
from lymphfeat.settings import HeadSettings

_TOGETHER = 25  # training sets held at a time


@dataclass(frozen=True)
class TrainingSet:
    """Training patients of one split, with all patients described and standardised over them."""

    patients: Tensor  # (n,) rows
    importance: Tensor  # (n,) of each patient's loss
    places: tuple[int, ...]  # of each statistic, the set of features that it reads
    statistics: tuple[Standardised, ...]
    values: tuple[Tensor, ...]  # of each statistic, (P, D)

    @classmethod
    def of(
        cls,
        descriptions: Sequence[tuple[int, Description]],
        patients: Tensor,
        importance: Tensor,
        sizes: Sequence[Tensor],
    ) -> "TrainingSet":
        """Learn the descriptions from patients (n,); sizes (P,) of the bags of every set."""
        places, statistics, standardised = [], [], []
        for place, description in descriptions:
            for statistic, values in description.learn(patients):
                own = Standardised.of(statistic, values[patients], sizes[place][patients])
                places.append(place)
                statistics.append(own)
                standardised.append(own.apply(values, sizes[place]))
        return cls(patients, importance, tuple(places), tuple(statistics), tuple(standardised))

    @property
    def gram(self) -> Tensor:
        """The Gram matrix (n, n) of the training patients, the mean over blocks."""
        parts = [values[self.patients] @ values[self.patients].T for values in self.values]
        return torch.stack(parts).mean(0)


@dataclass(frozen=True)
class Solved:
    """A training set's regression under one penalty."""

    penalty: float
    weights: tuple[Tensor, ...]  # of each block, (D,)
    intercept: float
    logits: Tensor  # (P,) of all patients


def solve_heads(
    sets: Sequence[TrainingSet], labels: Tensor, penalties: Sequence[float] = PENALTIES
) -> list[Solved]:
    """Solve one head for every training set, under the penalty it chooses; labels (P,)."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for place, each in enumerate(sets):
        by_size[len(each.patients)].append(place)
    found: dict[int, Solved] = {}
    for places in by_size.values():
        solved = _solve([sets[place] for place in places], labels, penalties)
        found |= dict(zip(places, solved, strict=True))
    return [found[place] for place in range(len(sets))]


def _solve(sets: Sequence[TrainingSet], labels: Tensor, penalties: Sequence[float]) -> list[Solved]:
    """Solve training sets of one size."""
    known = torch.stack([labels[each.patients] for each in sets]).double()  # (B, n)
    importance = torch.stack([each.importance for each in sets])  # (B, n)
    path = solve_paths(torch.stack([each.gram for each in sets]), known, importance, penalties)
    losses = [_log_loss(solution.left_out, known, importance) for solution in path]
    best = torch.stack(losses).argmin(0).tolist()  # (B,)
    return [
        _fold(each, penalties[chosen], path[chosen].alpha[b], float(path[chosen].intercept[b]))
        for b, (each, chosen) in enumerate(zip(sets, best, strict=True))
    ]


def _log_loss(logits: Tensor, labels: Tensor, importance: Tensor) -> Tensor:
    return (importance * (softplus(logits) - labels * logits)).mean(1)  # (B,)


def _fold(own: TrainingSet, penalty: float, alpha: Tensor, intercept: float) -> Solved:
    """Turn dual weights alpha (n,) into weights of the statistics."""
    blocks = len(own.values)
    weights = tuple(alpha @ values[own.patients] / blocks for values in own.values)
    parts = [values @ weight for values, weight in zip(own.values, weights, strict=True)]
    return Solved(penalty, weights, intercept, torch.stack(parts).sum(0) + intercept)


class ExactHeadTrainer(HeadTrainer):
    """Solves fits of one unit; there is nothing to learn after the first epoch."""

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        super().__init__(features, fits, sampling, tta=tta)
        self._descriptions = Descriptions([own.of_unit(self._unit) for own in features.sets])
        self._heads: dict[int, ExactHead] = {}
        self._losses = np.zeros(len(self._fits), np.float32)
        self._logits = torch.zeros(len(self._fits), len(features.labels), dtype=torch.float64)
        alike: dict[tuple[HeadSettings, int], list[int]] = defaultdict(list)
        for place, fit in enumerate(self._fits):
            alike[fit.head, len(fit.split.train)].append(place)
        for head, _ in alike:
            self._descriptions.of(head)  # made once, before threads ask for them
        chunks = (
            places[start : start + _TOGETHER]
            for places in alike.values()
            for start in range(0, len(places), _TOGETHER)
        )
        # A small factorisation uses one thread; several at a time use all.
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(self._solve, chunks))

    @classmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        return head.unit

    def _solve(self, places: Sequence[int]) -> None:
        """Solve one head on some splits with training sets of one size."""
        head = self._fits[places[0]].head
        sets = [self._training_set(self._fits[place]) for place in places]
        penalties = PENALTIES if head.penalty is None else (head.penalty,)
        labels = self._features.labels
        found = solve_heads(sets, labels, penalties)
        for place, own, solved in zip(places, sets, found, strict=True):
            blocks = zip(own.places, own.statistics, solved.weights, strict=True)
            self._heads[place] = ExactHead(
                head,
                tuple(Block(*block) for block in blocks),
                solved.intercept,
                solved.penalty,
            )
            self._logits[place] = solved.logits
            known = labels[own.patients][None].double()
            fitted = solved.logits[own.patients][None]
            self._losses[place] = float(_log_loss(fitted, known, own.importance[None]))

    def _training_set(self, fit: Fit) -> TrainingSet:
        features = self._features
        patients = torch.from_numpy(features.rows_of(fit.split.train)).to(features.device)
        labels = features.labels[patients]
        return TrainingSet.of(
            self._descriptions.of(fit.head),
            patients,
            class_weights(fit.head, labels)[labels].double(),
            [own.bags.sizes for own in self._descriptions.sets],
        )

    def keep(self, result: FittedHeads) -> None:
        """Write the heads into the result."""
        for place, position in enumerate(self._positions):
            result.modules[position] = self._heads[place]

    def evaluate_on(self, features: Features, result: FittedHeads) -> None:
        """Evaluate on other features of the same backbones, into a result of one epoch."""
        sets = [own.of_unit(self._unit) for own in features.sets]
        views = [self._score(sets, range(len(self._fits)), view) for view in self._views]
        result.curves[self._positions, 0] = torch.stack(views).mean(0).cpu().numpy()

    def _learn(self) -> NDArray[np.float32]:
        return self._losses

    def _probabilities(
        self, instances: Instances, wanted: Sequence[int], view: int, *, last: bool
    ) -> Tensor:
        if view == 0:
            return self._logits[list(wanted)].sigmoid().float()
        return self._score(self._descriptions.sets, wanted, view)

    def _score(self, sets: Sequence[Instances], wanted: Sequence[int], view: int) -> Tensor:
        """Return probabilities in a view, described anew: (wanted, P)."""
        whole = [_in_one(own, view) for own in sets]
        logits = torch.stack([self._heads[i].patient_logits(whole) for i in wanted])
        return logits.sigmoid().float()


def _in_one(instances: Instances, view: int) -> tuple[Tensor, Bags]:
    """Return all instances (M, C) in a view, and the patients."""
    return instances.source.span(0, int(instances.images[-1]), view), instances.bags
