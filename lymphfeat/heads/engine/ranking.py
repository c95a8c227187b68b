"""Training of the ranking family (METHOD §2 A): rank all instances, then learn from the selected.

All fits of one k_train share one matrix product per ranking phase and one batched step per
mini-batch.
Heads that differ only in their read-out (top1, topk at any k, topbottomk) share one scorer.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.heads.aggregators.ranking import Ranking, effective_k
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampler, Sampling, batched
from lymphfeat.heads.engine.scorers import Scorers, score
from lymphfeat.heads.stack import read_out
from lymphfeat.settings import HeadSettings


def learning(head: HeadSettings) -> HeadSettings:
    """Reset the settings of a head's read-out and keep those of its training."""
    return HeadSettings(
        agg="topk",
        unit=head.unit,
        k_train=head.k_train,
        k_percent=head.k_percent,
        k_min=head.k_min,
        loss=head.loss,
        class_weights=head.class_weights,
        lr=head.lr,
        weight_decay=head.weight_decay,
    )


@dataclass(frozen=True)
class _Lane:
    """The scorers of one split."""

    sampler: Sampler
    columns: slice


@dataclass(frozen=True)
class _ReadOut:
    """Fits with the same read-out of a ranking."""

    head: HeadSettings
    columns: Tensor | None  # (n,) their scorers; None is every one
    positions: list[int]


class RankingTrainer:
    """Trains fits that agree in unit, k_train and loss."""

    def __init__(
        self,
        features: Features,
        fits: Sequence[Fit],
        positions: Sequence[int],
        sampling: Sampling,
        *,
        tta: bool = False,
    ) -> None:
        """Take the positions of the fits that this trainer is for."""
        shared: dict[tuple[str, HeadSettings], list[int]] = defaultdict(list)
        for position in sorted(positions, key=lambda position: fits[position].split.id):
            shared[fits[position].split.id, learning(fits[position].head)].append(position)
        self._fits, self._positions = fits, list(shared.values())
        own = [fits[group[0]] for group in self._positions]
        self._head = own[0].head
        self._instances = features.of_unit(self._head.unit)
        self._views = range(sampling.views if tta else 1)
        self._labels = features.labels
        self._sampling = sampling
        self._scorers = Scorers(features, own)
        self._adam = self._scorers.optimizer(own)
        self._lanes = self._make_lanes(features, own)
        self._k = self._count_k()
        self._top = self._select()

    def _make_lanes(self, features: Features, own: Sequence[Fit]) -> list[_Lane]:
        lanes: list[_Lane] = []
        for column, fit in enumerate(own):
            if column and own[column - 1].split.id == fit.split.id:
                lanes[-1] = replace(lanes[-1], columns=slice(lanes[-1].columns.start, column + 1))
                continue
            train = features.rows_of(fit.split.train)
            sampler = Sampler(
                train, self._instances, self._sampling, self._scorers.generators[column]
            )
            lanes.append(_Lane(sampler, slice(column, column + 1)))
        return lanes

    def _count_k(self) -> Tensor:
        """Return how many instances of each patient are learnt from: (P,), on the CPU."""
        sizes = self._instances.bags.sizes.cpu()
        if self._sampling.images_per_patient is not None:
            most = self._sampling.images_per_patient * self._instances.per_image
            sizes = sizes.clamp(max=most)
        return effective_k(sizes, self._head.k_train, self._head.k_percent, self._head.k_min)

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Learn from the instances ranked highest, rank again, read out the probabilities."""
        losses = self._learn()  # (H,)
        for scorer, group in enumerate(self._positions):
            result.losses[group, epoch] = losses[scorer]
        self._evaluate(epoch, result)

    def evaluate_on(self, features: Features, result: FittedHeads) -> None:
        """Evaluate the trained heads on other features, into a result of one epoch."""
        self._instances = features.of_unit(self._head.unit)
        self._evaluate(0, result)

    def _evaluate(self, epoch: int, result: FittedHeads) -> None:
        last = epoch == result.losses.shape[1] - 1
        read_outs = self._wanted(last)
        for wanted in read_outs:
            result.curves[wanted.positions, epoch] = 0
        for view in self._views:
            # The ranking of the identity serves this evaluation and the next epoch's learning.
            self._rank(view, read_outs, epoch, result, select=view == 0 and not last)

    def _wanted(self, last: bool) -> list[_ReadOut]:
        """List what to evaluate after an epoch."""
        scorers: dict[HeadSettings, list[int]] = defaultdict(list)
        positions: dict[HeadSettings, list[int]] = defaultdict(list)
        for scorer, group in enumerate(self._positions):
            for position in group:
                if last or self._fits[position].curve:
                    head = self._fits[position].head
                    key = replace(head, lr=1.0, weight_decay=0.0, class_weights="none")
                    scorers[key].append(scorer)
                    positions[key].append(position)
        return [_ReadOut(head, self._columns(scorers[head]), positions[head]) for head in scorers]

    def _columns(self, scorers: list[int]) -> Tensor | None:
        if scorers == list(range(len(self._positions))):
            return None
        return torch.tensor(scorers, device=self._instances.device)

    # --- ranking ----------------------------------------------------------------------------------

    def _rank(
        self,
        view: int,
        read_outs: Sequence[_ReadOut],
        epoch: int,
        result: FittedHeads,
        *,
        select: bool,
    ) -> None:
        """Rank all instances in a view; add its share to the probabilities, select for learning."""
        weight, bias = self._scorers.folded()
        drawn = self._draw() if select else None
        tops = []
        for patients, instances, bags in self._instances.chunks(len(weight), view):
            logits = score(instances, weight, bias)
            ranking = Ranking.of(logits, bags)
            for wanted in read_outs:
                chosen = ranking if wanted.columns is None else ranking.columns(wanted.columns)
                share = read_out(wanted.head, chosen).T.cpu().numpy() / len(self._views)  # (n, b)
                result.curves[wanted.positions, epoch, patients] += share
            if select:
                tops.append(self._top_of(ranking, patients, logits, bags, drawn))
        if select:
            self._top = torch.cat(tops)

    def _select(self) -> Tensor:
        """Return the rows (P, H, k) of the instances to learn from first, on the CPU."""
        weight, bias = self._scorers.folded()
        drawn = self._draw()
        return torch.cat(
            [
                self._top_of(None, patients, score(instances, weight, bias), bags, drawn)
                for patients, instances, bags in self._instances.chunks(len(weight))
            ]
        )

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
        self,
        ranking: Ranking | None,
        patients: slice,
        logits: Tensor,
        bags: Bags,
        drawn: Tensor | None,
    ) -> Tensor:
        """Return the rows, among all, of a chunk's highest instances: (b, H, k), on the CPU."""
        start = int(self._instances.images[patients.start]) * self._instances.per_image
        if drawn is not None:
            widths = [lane.columns.stop - lane.columns.start for lane in self._lanes]
            of_column = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
            seen = drawn[:, start : start + len(logits)][of_column.to(drawn.device)]  # (H, m)
            logits, ranking = logits.masked_fill(~seen.T, -torch.inf), None
        ranking = ranking or Ranking.of(logits, bags)
        return ranking.top(int(self._k.max())).cpu() + start

    # --- learning ---------------------------------------------------------------------------------

    def _learn(self) -> NDArray[np.float32]:
        rows, views = self._plan()
        totals = torch.zeros(len(rows), device=rows.device)
        steps = torch.zeros(len(rows), device=rows.device)
        for step in range(rows.shape[1]):
            loss, active = self._step(rows[:, step], None if views is None else views[:, step])
            totals += loss
            steps += active
        return np.asarray((totals / steps).cpu().numpy())

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
        plan = torch.full((len(self._positions), steps, batch, k), -1)
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
        """Write the scorers, folded, into the result."""
        weight, bias = self._scorers.folded()
        for scorer, group in enumerate(self._positions):
            result.weight[group] = weight[scorer].cpu().numpy()
            result.bias[group] = bias[scorer].cpu().numpy()
