"""Training of the ranking family (METHOD §2 A): rank all instances, then learn from the selected.

All fits of one k_train share one matrix product per ranking phase and one batched step per
mini-batch.
Heads that differ only in how they aggregate (top1, topk at any k, topbottomk) share one scorer.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.heads.aggregators.ranking import Ranking, effective_k
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampler, Sampling, batched
from lymphfeat.heads.engine.scorers import Scorers, score
from lymphfeat.heads.engine.trainer import HeadTrainer, runs
from lymphfeat.heads.registry import RankingAggregator, aggregator_of
from lymphfeat.settings import HeadSettings


def _learning(head: HeadSettings) -> HeadSettings:
    """Reset the settings of a head that do not change what its scorer learns."""
    return replace(head, agg="topk", k_agg=1, reduce="mean")


def _aggregation(head: HeadSettings) -> HeadSettings:
    """Reset the settings of a head that only its optimiser uses."""
    return replace(head, lr=1.0, weight_decay=0.0, class_weights="none")


@dataclass(frozen=True)
class _Lane:
    """The scorers of one split."""

    sampler: Sampler
    columns: slice


@dataclass(frozen=True)
class _Reading:
    """Fits that aggregate in the same way."""

    head: HeadSettings
    columns: Tensor | None  # (n,) their scorers; None is every one
    places: list[int]  # (n,) among the fits to evaluate

    def of(self, ranking: Ranking) -> Tensor:
        """Return the fits' probabilities of a chunk of patients: (n, b)."""
        chosen = ranking if self.columns is None else ranking.columns(self.columns)
        return aggregator_of(self.head, RankingAggregator).of_ranked(self.head, chosen).T


class RankingHeadTrainer(HeadTrainer):
    """Trains fits that agree in unit, k_train and loss."""

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        super().__init__(features, fits, sampling, tta=tta)
        keys = [(fit.split.id, _learning(fit.head)) for fit in self._fits]
        learners: dict[Hashable, Fit] = {}  # a fit of every scorer
        for key, fit in zip(keys, self._fits, strict=True):
            learners.setdefault(key, fit)
        column = {key: i for i, key in enumerate(learners)}
        self._columns = [column[key] for key in keys]  # (n,) the scorer of every fit
        own = list(learners.values())
        self._head = own[0].head
        self._scorers = Scorers(features, own)
        self._adam = self._scorers.optimizer(own)
        self._lanes = [
            self._make_lane(own[columns.start], columns)
            for columns in runs([fit.split.id for fit in own])
        ]
        self._k = self._count_k()
        self._top = self._select()

    def _make_lane(self, fit: Fit, columns: slice) -> _Lane:
        return _Lane(self._sampler(fit.split, self._scorers.generators[columns.start]), columns)

    @classmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        return _aggregation(_learning(head))

    @classmethod
    def learner_of(cls, head: HeadSettings) -> Hashable:
        return _learning(head)

    @classmethod
    def bytes_of(cls, head: HeadSettings, channels: int, batch_size: int) -> int:
        batch = 3 * batch_size * head.k_train  # copied twice
        return super().bytes_of(head, channels, batch_size) + 4 * channels * batch

    def _count_k(self) -> Tensor:
        """Return how many instances of each patient are learnt from: (P,), on the CPU."""
        sizes = self._instances.bags.sizes.cpu()
        if self._sampling.images_per_patient is not None:
            most = self._sampling.images_per_patient * self._instances.per_image
            sizes = sizes.clamp(max=most)
        return effective_k(sizes, self._head.k_train, self._head.k_percent, self._head.k_min)

    # --- ranking ----------------------------------------------------------------------------------

    def _probabilities(
        self, instances: Instances, wanted: Sequence[int], view: int, *, last: bool
    ) -> Tensor:
        # The ranking of the identity serves this evaluation and the next epoch's learning.
        select = view == 0 and not last
        drawn = self._draw() if select else None
        readings = self._readings(wanted)
        result = self._scorers.bias.new_empty(len(wanted), len(self._labels))
        tops = []
        for patients, logits, ranking in self._rank(instances, view):
            for reading in readings:
                result[reading.places, patients] = reading.of(ranking)
            if select:
                tops.append(self._top_of(patients, logits, ranking, drawn))
        if select:
            self._top = torch.cat(tops)
        return result

    def _readings(self, wanted: Sequence[int]) -> list[_Reading]:
        places: dict[HeadSettings, list[int]] = defaultdict(list)
        for place in sorted(range(len(wanted)), key=lambda place: self._columns[wanted[place]]):
            places[_aggregation(self._fits[wanted[place]].head)].append(place)
        return [
            _Reading(head, self._selection([self._columns[wanted[place]] for place in own]), own)
            for head, own in places.items()
        ]

    def _selection(self, columns: list[int]) -> Tensor | None:
        if columns == list(range(len(self._scorers.bias))):
            return None
        return torch.tensor(columns, device=self._instances.device)

    def _select(self) -> Tensor:
        """Return the rows (P, H, k) of the instances to learn from first, on the CPU."""
        drawn = self._draw()
        ranked = self._rank(self._instances, 0)
        return torch.cat([self._top_of(*chunk, drawn) for chunk in ranked])

    def _rank(self, instances: Instances, view: int) -> Iterator[tuple[slice, Tensor, Ranking]]:
        """Rank all instances in a view: (patients, logits (m, H), ranking) of some at a time."""
        weight, bias = self._scorers.folded()
        for patients, values, bags in instances.chunks(len(weight), view):
            logits = score(values, weight, bias)
            yield patients, logits, Ranking.of(logits, bags)

    def _draw(self) -> Tensor | None:
        """Mark the instances drawn for each lane's next epoch: (lanes, M); None is all."""
        if self._sampling.images_per_patient is None:
            return None
        n = int(self._instances.images[-1])
        drawn = torch.zeros(len(self._lanes), n, dtype=torch.bool)
        for lane, row in zip(self._lanes, drawn, strict=True):
            for patient in lane.sampler.train.tolist():
                row[lane.sampler.images_of(patient)] = True
        instances = drawn.repeat_interleave(self._instances.per_image, dim=1)
        return instances.to(self._instances.device)

    def _top_of(
        self, patients: slice, logits: Tensor, ranking: Ranking, drawn: Tensor | None
    ) -> Tensor:
        """Return the rows, among all, of a chunk's highest instances: (b, H, k), on the CPU."""
        start = int(self._instances.images[patients.start]) * self._instances.per_image
        if drawn is not None:
            widths = [lane.columns.stop - lane.columns.start for lane in self._lanes]
            of_column = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
            seen = drawn[:, start : start + len(logits)][of_column.to(drawn.device)]  # (H, m)
            ranking = Ranking.of(logits.masked_fill(~seen.T, -torch.inf), ranking.bags)
        return ranking.top(int(self._k.max())).cpu() + start

    # --- learning ---------------------------------------------------------------------------------

    def _learn(self) -> NDArray[np.float32]:
        """Learn from the instances ranked highest."""
        rows, views = self._plan()
        totals = torch.zeros(len(rows), device=rows.device)
        steps = torch.zeros(len(rows), device=rows.device)
        for step in range(rows.shape[1]):
            loss, active = self._step(rows[:, step], None if views is None else views[:, step])
            totals += loss
            steps += active
        return np.asarray((totals / steps)[self._columns].cpu().numpy())

    def _plan(self) -> tuple[Tensor, Tensor | None]:
        """Lay out each scorer's shuffled mini-batches of instance rows: (H, steps, batch, k).

        Padding is -1. With the instance loss k is 1 and a batch counts instances; with the bag loss
        it counts patients, each with its k_train instances. With several views, which of them each
        is seen in.
        """
        orders = [self._order(lane) for lane in self._lanes]  # (steps, batch, S, k) each
        steps = max(len(order) for order in orders)
        device = self._instances.device
        _, batch, _, k = orders[0].shape
        plan = torch.full((len(self._scorers.bias), steps, batch, k), -1)
        views = torch.zeros_like(plan)
        for lane, order in zip(self._lanes, orders, strict=True):
            plan[lane.columns, : len(order)] = order.movedim(2, 0)
            drawn = lane.sampler.views((len(order), batch, k))
            if drawn is not None:
                views[lane.columns, : len(order)] = drawn
        return plan.to(device), views.to(device) if self._sampling.views > 1 else None

    def _order(self, lane: _Lane) -> Tensor:
        train = lane.sampler.train
        top = self._top[train, lane.columns].movedim(1, 2)  # (patients, k, S)
        valid = torch.arange(top.shape[1]) < self._k[train, None]  # (patients, k)
        if self._head.loss == "instance":
            rows = top[valid][:, None]  # (selected, 1, S)
        else:
            rows = top.masked_fill(~valid[:, :, None], -1)
        shuffled = rows[lane.sampler.shuffled(len(rows))]
        return batched(shuffled, self._sampling.batch_size, -1).movedim(2, 3)

    def _step(self, rows: Tensor, views: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take one step of every scorer on its rows (H, batch, k); return loss and active, (H,)."""
        real = rows >= 0
        present = real.any(2)  # (H, batch)
        active = present.any(1).float()
        chosen = self._instances.pick(rows.clamp(min=0), views).float()  # (H, batch, k, C)
        share = real / real.sum(2, keepdim=True).clamp(min=1)  # (H, batch, k)
        inputs = torch.einsum("hbkc,hbk->hbc", chosen, share)  # the mean logit is of the mean input
        weight, bias = self._scorers.folded()
        logits = torch.einsum("hbc,hc->hb", inputs, weight) + bias[:, None]
        labels = self._labels[self._instances.bags.index[rows[:, :, 0].clamp(min=0)]]  # (H, batch)
        counts = present * self._scorers.class_weights.gather(1, labels.clamp(min=0))
        counts = counts / present.sum(1, keepdim=True).clamp(min=1)
        slope = (logits.sigmoid() - labels) * counts  # (H, batch) d loss / d logit
        total = slope.sum(1)
        gradient = torch.einsum("hb,hbc->hc", slope, inputs)
        self._adam.step([self._scorers.scaling.unfold_gradient(gradient, total), total], active)
        losses = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        return (losses * counts).sum(1), active

    def keep(self, result: FittedHeads) -> None:
        self._scorers.keep(result, self._positions, self._columns)
