"""Heads of the family `distribution`, solved exactly: all splits and penalties together.

A head is an L2 logistic regression on blocks of statistics (METHOD §2 C). Each block is
standardised over its training patients and divided by the square root of its length, so blocks
weigh alike, unless their weights are chosen, too. Penalty and weights are chosen by the training
patients' left-out log loss: every training set, outer or inner, chooses its own, from its own
patients.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import softplus

from lymphfeat.heads.aggregators.distribution import Standardised
from lymphfeat.heads.engine.descriptions import Description, Descriptions
from lymphfeat.heads.engine.instances import Features, Instances, Resident
from lymphfeat.heads.engine.logistic import PENALTIES, solve_paths
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.engine.trainer import HeadTrainer, Tick
from lymphfeat.heads.exact_head import Block, ExactHead
from lymphfeat.heads.stack import class_weights
from lymphfeat.runtime.devices import cpu_threads, work_alone
from lymphfeat.runtime.threads import in_order
from lymphfeat.settings import HeadSettings

_TOGETHER = 25  # training sets held at a time
_PARTS = {1: 1, 2: 4, 3: 3}  # by number of blocks: weights are multiples of 1 / parts; of more, 1/2
Mixture = tuple[float, ...]  # of each block its weight, at least 0; they add up to 1


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
    def grams(self) -> Tensor:
        """The Gram matrices (blocks, n, n) of the training patients."""
        known = [values[self.patients] for values in self.values]
        return torch.stack([values @ values.T for values in known])


@dataclass(frozen=True)
class Solved:
    """A training set's regression under one penalty and mixture of its blocks."""

    penalty: float
    mixture: Mixture
    weights: tuple[Tensor, ...]  # of each block, (D,)
    intercept: Tensor  # ()
    logits: Tensor  # (P,) of all patients

    def head(self, settings: HeadSettings, own: TrainingSet) -> ExactHead:
        """Return the head that this regression is, on the training set's statistics."""
        blocks = zip(own.places, own.statistics, self.weights, strict=True)
        return ExactHead(
            settings,
            tuple(Block(*block) for block in blocks),
            self.intercept,
            self.penalty,
            self.mixture,
        )


def mixtures(blocks: int) -> list[Mixture]:
    """List the weights to choose from: equal ones first, then a lattice that has each block alone.

    >>> mixtures(2)
    [(0.5, 0.5), (1.0, 0.0), (0.75, 0.25), (0.25, 0.75), (0.0, 1.0)]
    """
    parts = _PARTS.get(blocks, 2)
    shared_out = combinations_with_replacement(range(blocks), parts)
    lattice = [tuple(each.count(block) / parts for block in range(blocks)) for each in shared_out]
    return list(dict.fromkeys([equal_weights(blocks), *lattice]))


def equal_weights(blocks: int) -> Mixture:
    """Return the mixture in which all blocks weigh alike."""
    return (1 / blocks,) * blocks


def solve_heads(
    sets: Sequence[TrainingSet],
    labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
    *,
    mix: bool = False,
) -> list[Solved]:
    """Solve one head for every training set, under the penalty it chooses; labels (P,).

    With `mix` it also chooses the weights of its blocks.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, each in enumerate(sets):
        alike[len(each.patients), len(each.values)].append(place)
    found: dict[int, Solved] = {}
    for (_, blocks), places in alike.items():
        offered = mixtures(blocks) if mix else [equal_weights(blocks)]
        solved = _solve([sets[place] for place in places], labels, penalties, offered)
        found |= dict(zip(places, solved, strict=True))
    return [found[place] for place in range(len(sets))]


def _solve(
    sets: Sequence[TrainingSet],
    labels: Tensor,
    penalties: Sequence[float],
    offered: Sequence[Mixture],
) -> list[Solved]:
    """Solve training sets of one size, under the best of the penalties and mixtures offered."""
    known = torch.stack([labels[each.patients] for each in sets]).double()  # (B, n)
    importance = torch.stack([each.importance for each in sets])  # (B, n)
    grams = torch.stack([each.grams for each in sets])  # (B, blocks, n, n)
    best: list[Solved | None] = [None] * len(sets)
    lowest = torch.full((len(sets),), torch.inf, dtype=torch.float64)
    for mixture in offered:
        path = solve_paths(_mixed(grams, mixture), known, importance, penalties)
        losses = torch.stack([_log_loss(one.left_out, known, importance) for one in path])  # (L, B)
        loss, chosen = losses.cpu().min(0)  # (B,)
        for b in (loss < lowest).nonzero()[:, 0].tolist():
            solution, penalty = path[int(chosen[b])], penalties[int(chosen[b])]
            alpha, intercept = solution.alpha[b], solution.intercept[b]
            best[b] = _fold(sets[b], penalty, mixture, alpha, intercept)
        lowest = torch.minimum(lowest, loss)
    return [solved for solved in best if solved is not None]


def _mixed(grams: Tensor, mixture: Mixture) -> Tensor:
    """Return the weighted sum of blocks' Gram matrices: (B, blocks, n, n) -> (B, n, n)."""
    return torch.einsum("bkij,k->bij", grams, grams.new_tensor(mixture))


def _log_loss(logits: Tensor, labels: Tensor, importance: Tensor) -> Tensor:
    return (importance * (softplus(logits) - labels * logits)).mean(1)  # (B,)


def _fold(
    own: TrainingSet, penalty: float, mixture: Mixture, alpha: Tensor, intercept: Tensor
) -> Solved:
    """Turn dual weights alpha (n,) into weights of the statistics."""
    weights = tuple(
        part * (alpha @ values[own.patients])
        for part, values in zip(mixture, own.values, strict=True)
    )
    parts = [values @ weight for values, weight in zip(own.values, weights, strict=True)]
    return Solved(penalty, mixture, weights, intercept, torch.stack(parts).sum(0) + intercept)


def solve_head(
    settings: HeadSettings,
    instances: Tensor,
    sizes: NDArray[np.int64],
    labels: Tensor,
    chosen: tuple[float, Mixture] | None = None,
) -> ExactHead:
    """Solve one head on patients with `sizes` (P,) images, all of them for training.

    Takes the instances (N, U, C) of their images, patient after patient, and labels (P,) int64.
    `chosen` are a penalty and weights of the blocks, in place of a choice on these instances.
    """
    per_image, device = instances.shape[1], instances.device
    source = Resident(instances.flatten(0, 1)[None], per_image)
    images = np.concatenate([[0], np.cumsum(sizes)])
    descriptions = Descriptions([Instances(source, per_image, images, device)])
    own = _training_set(settings, descriptions, torch.arange(len(sizes), device=device), labels)
    if chosen is None:
        (solved,) = _solve_as(settings, [own], labels)
    else:
        penalty, mixture = chosen
        (solved,) = _solve([own], labels, [penalty], [mixture])
    return solved.head(settings, own)


def _training_set(
    settings: HeadSettings, descriptions: Descriptions, patients: Tensor, labels: Tensor
) -> TrainingSet:
    """Make a head's training set of patients (n,), out of those described, with labels (P,)."""
    known = labels[patients]
    return TrainingSet.of(
        descriptions.of(settings),
        patients,
        class_weights(settings, known)[known].double(),
        [own.bags.sizes for own in descriptions.sets],
    )


def _solve_as(settings: HeadSettings, sets: Sequence[TrainingSet], labels: Tensor) -> list[Solved]:
    """Solve a head's training sets under the penalty and block weights given, or chosen."""
    penalties = PENALTIES if settings.penalty is None else (settings.penalty,)
    return solve_heads(sets, labels, penalties, mix=settings.block_weights == "chosen")


class ExactHeadTrainer(HeadTrainer):
    """Solves the fits of one head; there is nothing to learn after the first epoch."""

    threaded = True

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        super().__init__(features, fits, sampling, tta=tta)
        self._descriptions = features.once(
            ("descriptions", self._unit),
            lambda: Descriptions([own.of_unit(self._unit) for own in features.sets]),
        )
        self._heads: dict[int, ExactHead] = {}
        self._losses = np.zeros(len(self._fits), np.float32)
        self._logits = torch.zeros(len(self._fits), len(features.labels), dtype=torch.float64)

    @classmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        return head

    @classmethod
    def work_of(cls, epochs: int) -> int:
        return 1

    def fit(self, result: FittedHeads, tick: Tick) -> None:
        self._descriptions.of(self._fits[0].head)  # made once, before threads ask for them
        # Threads of small factorisations and of k-means would mostly wait for each other.
        n = torch.get_num_threads()
        with cpu_threads(1), threadpool_limits(1):
            solved = in_order(
                self._solve, self._chunks(), threads=n, ahead=2 * n, name="solve", begin=work_alone
            )
            for places in solved:
                tick(len(places), "")
            self.run_epoch(result.losses.shape[1] - 1, result)
        self._repeat_last(result)

    def _repeat_last(self, result: FittedHeads) -> None:
        """Write losses and probabilities of the last epoch into all before: nothing changes."""
        result.losses[self._positions] = self._losses[:, None]
        for position, fit in zip(self._positions, self._fits, strict=True):
            if fit.curve != "nobody":
                rows = self._evaluated(fit, last=False)
                result.curves[position, :-1, rows] = result.curves[position, -1, rows, None]

    def _chunks(self) -> list[list[int]]:
        """Cut the fits into chunks with training sets of one size, the largest first."""
        alike: dict[int, list[int]] = defaultdict(list)
        for place, fit in enumerate(self._fits):
            alike[len(fit.split.train)].append(place)
        return [
            alike[size][start : start + _TOGETHER]
            for size in sorted(alike, reverse=True)
            for start in range(0, len(alike[size]), _TOGETHER)
        ]

    def _solve(self, places: list[int]) -> list[int]:
        """Solve the head on some splits with training sets of one size; return them."""
        head = self._fits[places[0]].head
        sets = [self._training_set(self._fits[place]) for place in places]
        labels = self._features.labels
        for place, own, solved in zip(places, sets, _solve_as(head, sets, labels), strict=True):
            self._heads[place] = solved.head(head, own)
            self._logits[place] = solved.logits
            known = labels[own.patients][None].double()
            fitted = solved.logits[own.patients][None]
            self._losses[place] = float(_log_loss(fitted, known, own.importance[None]))
        return places

    def _training_set(self, fit: Fit) -> TrainingSet:
        features = self._features
        patients = torch.from_numpy(features.rows_of(fit.split.train)).to(features.device)
        return _training_set(fit.head, self._descriptions, patients, features.labels)

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
        heads = [self._heads[i] for i in wanted]
        scores = heads[0].intercept.new_zeros(len(heads), self._logits.shape[1])
        for place, own in enumerate(sets):
            for patients, values, bags in own.chunks(1, view):
                for score, head in zip(scores, heads, strict=True):
                    score[patients] += head.score_of_set(place, values, bags)
        return (scores + torch.stack([head.intercept for head in heads])[:, None]).sigmoid().float()
