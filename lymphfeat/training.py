"""The head engine: fits many heads together on cached feature maps.

A *fit* is one head's settings on one split. Fits are laid side by side as one head axis H:

- The **ranking family** is trained on single instances, so all fits of one k_train share one
  matrix product a ranking phase and one batched step a mini-batch. Heads that differ only in what
  they read out (top1, topk at any k, topbottomk) share one scorer: their training is the same.
- The **weighted family** is trained on whole patients. Fits of one split see the same patients in
  the same order and share the products of that batch; patients are read where they lie, without
  gathering. The gradient of a linear scorer is written out (Gᵀ X), so that the features are read
  twice a step and nothing of their size is allocated.

Every fit draws its own initialisation and order from a generator seeded by its split alone, so
fitting many together gives what fitting one alone gives.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.aggregators.ranking import Ranking, effective_k
from lymphfeat.bags import Bags
from lymphfeat.heads import AGGREGATORS, AggregatorState, initial_scorer, read_out
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import HeadSettings
from lymphfeat.splits import Split

_CHUNK_BYTES = 64 << 20  # of feature maps laid out as pixels at a time
_COLUMNS_AT_ONCE = 64  # heads whose pixel logits are held at a time


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One head's settings on one split."""

    head: HeadSettings
    split: Split
    curve: bool = True  # evaluate after every epoch; without, only after the last


@dataclass(frozen=True, kw_only=True)
class FittedHeads:
    """What came of fits, in the order they were asked for."""

    fits: tuple[Fit, ...]
    curves: NDArray[np.float32]  # (fits, epochs, P) probabilities after every epoch; NaN unasked
    losses: NDArray[np.float32]  # (fits, epochs) mean training loss
    weight: NDArray[np.float32]  # (fits, C), as applied to raw features
    bias: NDArray[np.float32]  # (fits,)
    extras: dict[str, NDArray[np.float32]]  # gamma, beta, running_mean, running_var: (fits,)

    def take(self, positions: Sequence[int]) -> "FittedHeads":
        """Return some of the fits."""
        index = list(positions)
        return FittedHeads(
            fits=tuple(self.fits[i] for i in index),
            curves=self.curves[index],
            losses=self.losses[index],
            weight=self.weight[index],
            bias=self.bias[index],
            extras={name: values[index] for name, values in self.extras.items()},
        )


class Features:
    """A store's feature maps as matrices of instances, and their patients."""

    def __init__(
        self,
        maps: NDArray[np.float16],
        pooled: NDArray[np.float32],
        offsets: NDArray[np.int64],
        ids: Sequence[str],
        labels: NDArray[np.int64],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Take maps (N, C, h, w) and their averages (N, C); the pixels are laid out when used."""
        self._maps = maps
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.images = torch.from_numpy(np.array(pooled)).to(self.device, dtype)  # (N, C)
        self.bags = Bags.of(np.diff(offsets), self.device)  # images
        self.offsets = offsets
        self.labels = torch.from_numpy(np.array(labels)).to(self.device)
        self.row = {patient: row for row, patient in enumerate(ids)}

    @property
    def channels(self) -> int:
        return int(self.images.shape[1])

    @cached_property
    def pixels_per_image(self) -> int:
        return int(math.prod(self._maps.shape[2:]))

    @cached_property
    def pixels(self) -> Tensor:
        """(N · h · w, C): one row a pixel, images and patients contiguous."""
        n, c = self._maps.shape[:2]
        pixels = torch.empty(n, self.pixels_per_image, c, dtype=self.dtype, device=self.device)
        step = max(1, _CHUNK_BYTES // (self._maps[0].nbytes * 2))
        for start in range(0, n, step):
            block = torch.from_numpy(np.array(self._maps[start : start + step]))
            pixels[start : start + step] = block.to(self.device, self.dtype).flatten(2).mT
        return pixels.flatten(0, 1)

    def of_unit(self, unit: str) -> tuple[Tensor, int]:
        """Return the instances (M, C) of a unit, and how many an image has."""
        return (self.pixels, self.pixels_per_image) if unit == "pixel" else (self.images, 1)

    def rows_of(self, patients: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self.row[patient] for patient in patients])


@dataclass(frozen=True)
class Scaling:
    """Per split and channel, mean and 1 / standard deviation over its TRAINING patients' images.

    A scorer is trained on standardised features and applied to raw ones: it is folded, (w / s,
    b − w · m / s), so no aggregator knows of it and every head stays a 1×1 convolution. A channel
    that never varies in training gets scale 0 and so weight 0: Adam would blow up the rounding
    errors of its gradient.
    """

    mean: Tensor  # (H, C)
    scale: Tensor  # (H, C)

    @classmethod
    def of(cls, features: Features, fits: Sequence[Fit]) -> "Scaling":
        moments = {train: _moments(features, train) for train in {fit.split.train for fit in fits}}
        pairs = [moments[fit.split.train] for fit in fits]
        return cls(
            torch.stack([mean for mean, _ in pairs]), torch.stack([scale for _, scale in pairs])
        )

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scorer (H, C), (H,) that gives the same logits on raw features."""
        folded = weight * self.scale
        return folded, bias - (folded * self.mean).sum(1)

    def unfold_gradient(self, folded: Tensor, total: Tensor) -> Tensor:
        """Turn a gradient by the folded weight (H, C) into one by the weight; `total` (H,)."""
        return (folded - total[:, None] * self.mean) * self.scale


def _moments(features: Features, patients: Sequence[str]) -> tuple[Tensor, Tensor]:
    rows = [
        slice(features.offsets[row], features.offsets[row + 1])
        for row in sorted(features.rows_of(patients))
    ]
    images = torch.cat([features.images[part] for part in rows]).float()  # (n, C)
    std, mean = torch.std_mean(images, dim=0, correction=0)
    return mean, torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), 0.0)


class StackedAdam:
    """Adam (Kingma & Ba 2015, torch's defaults) for H heads, each with its own lr and step count.

    Heads without a gradient in a step (`active` false) are left exactly as they are.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor, weight_decay: Tensor) -> None:
        """Take parameters (H, …); lr and weight_decay (H,)."""
        self._parameters = list(parameters)
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]
        self._lr, self._weight_decay = lr, weight_decay
        self._steps = torch.zeros_like(lr)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], active: Tensor) -> None:
        """Update the active (H,) heads by their gradients, (H, …) each."""
        self._steps += active
        steps = self._steps.clamp(min=1)
        step_size = active * self._lr / (1 - 0.9**steps)
        second_correction = (1 - 0.999**steps).sqrt()
        for parameter, gradient, first, second in zip(
            self._parameters, gradients, self._first, self._second, strict=True
        ):
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            on = active.view(shape)
            gradient = gradient + self._weight_decay.view(shape) * parameter
            first.lerp_(gradient, 0.1 * on)
            second.lerp_(gradient * gradient, 0.001 * on)
            divisor = second.sqrt() / second_correction.view(shape) + 1e-8
            parameter -= step_size.view(shape) * first / divisor


def split_generator(split: Split) -> torch.Generator:
    """Return the generator of a split's initialisation and order: nothing else seeds a fit."""
    return torch.Generator().manual_seed(zlib.crc32(f"{split.seed}/{split.id}".encode()))


def fit_heads(
    features: Features,
    fits: Sequence[Fit],
    *,
    epochs: int,
    batch_size: int = 16,
    progress: Progress = silent,
) -> FittedHeads:
    """Fit all heads together; keep every patient's probability after every epoch."""
    result = FittedHeads(
        fits=tuple(fits),
        curves=np.full((len(fits), epochs, len(features.labels)), np.nan, np.float32),
        losses=np.zeros((len(fits), epochs), np.float32),
        weight=np.zeros((len(fits), features.channels), np.float32),
        bias=np.zeros(len(fits), np.float32),
        extras={
            name: np.zeros(len(fits), np.float32)
            for name in ("gamma", "beta", "running_mean", "running_var")
        },
    )
    groups = _group(fits)
    trainers = [_make_trainer(features, fits, group, batch_size) for group in groups]
    for epoch in range(epochs):
        for trainer in trainers:
            trainer.run_epoch(epoch, result)
        progress(epoch + 1, epochs, f"{len(fits)} heads")
    for trainer in trainers:
        trainer.keep(result)
    return result


def _group(fits: Sequence[Fit]) -> list[list[int]]:
    """Group the positions of fits that can be trained as one stack."""
    groups: dict[HeadSettings, list[int]] = defaultdict(list)
    for position, fit in enumerate(fits):
        groups[_stack_key(fit.head)].append(position)
    return list(groups.values())


def _stack_key(head: HeadSettings) -> HeadSettings:
    """Blank out what may differ within one stack."""
    if AGGREGATORS[head.agg].family == "ranking":
        return HeadSettings(
            agg="topk",
            unit=head.unit,
            k_train=head.k_train,
            k_percent=head.k_percent,
            k_min=head.k_min,
            loss=head.loss,
        )
    # The mean over pixels is the mean over images, for a sixteenth of the work.
    return HeadSettings(agg="mean", unit="image" if head.agg == "mean" else head.unit)


def _make_trainer(
    features: Features, fits: Sequence[Fit], positions: list[int], batch_size: int
) -> "RankingTrainer | WeightedTrainer":
    ranked = AGGREGATORS[fits[positions[0]].head.agg].family == "ranking"
    return (RankingTrainer if ranked else WeightedTrainer)(features, fits, positions, batch_size)


class _Scorers:
    """The stacked linear scorers of a trainer: standardised inside, folded for use."""

    def __init__(self, features: Features, fits: Sequence[Fit]) -> None:
        """Initialise one scorer for each of `fits`."""
        device = features.device
        self.scaling = Scaling.of(features, fits)
        self.generators = [split_generator(fit.split) for fit in fits]
        drawn = [initial_scorer(features.channels, generator) for generator in self.generators]
        self.weight = torch.stack([weight for weight, _ in drawn]).to(device)  # (H, C)
        self.bias = torch.stack([bias for _, bias in drawn]).to(device)  # (H,)
        self.lr = torch.tensor([fit.head.lr for fit in fits], device=device)
        self.weight_decay = torch.tensor([fit.head.weight_decay for fit in fits], device=device)

    def folded(self) -> tuple[Tensor, Tensor]:
        return self.scaling.fold(self.weight, self.bias)


def _score(instances: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Score instances (M, C) by folded scorers (H, C), (H,): logits (M, H) in float32."""
    return (instances @ weight.to(instances.dtype).mT).float() + bias


class RankingTrainer:
    """Trains ranking-family fits: rank all instances, then learn from the selected ones."""

    def __init__(
        self, features: Features, fits: Sequence[Fit], positions: list[int], batch_size: int
    ) -> None:
        # Fits alike in all but what they read out share a scorer.
        scorers: dict[tuple[str, float, float], list[int]] = defaultdict(list)
        for position in positions:
            fit = fits[position]
            scorers[fit.split.id, fit.head.lr, fit.head.weight_decay].append(position)
        self._positions = list(scorers.values())
        self._fits = fits
        own = [fits[group[0]] for group in self._positions]
        self._head = own[0].head
        self._instances, per_image = features.of_unit(self._head.unit)
        self._bags = features.bags.times(per_image)
        self._labels = features.labels
        self._scorers = _Scorers(features, own)
        self._train_rows = [features.rows_of(fit.split.train) for fit in own]
        self._batch_size = batch_size
        self._adam = StackedAdam(
            [self._scorers.weight, self._scorers.bias],
            self._scorers.lr,
            self._scorers.weight_decay,
        )
        head = self._head
        self._k = effective_k(self._bags.sizes, head.k_train, head.k_percent, head.k_min)
        self._ranking = self._rank()

    def _rank(self) -> Ranking:
        return Ranking.of(_score(self._instances, *self._scorers.folded()), self._bags)

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Learn from the instances ranked highest, rank anew, read the probabilities out."""
        losses = self._learn()  # (H,)
        self._ranking = self._rank()  # serves this epoch's evaluation and the next one's learning
        cache: dict[HeadSettings, NDArray[np.float32]] = {}
        for scorer, group in enumerate(self._positions):
            for position in group:
                head = replace(self._fits[position].head, lr=1.0, weight_decay=0.0)
                if head not in cache:
                    cache[head] = read_out(head, self._ranking).T.cpu().numpy()  # (H, P)
                result.curves[position, epoch] = cache[head][scorer]
                result.losses[position, epoch] = losses[scorer]

    def _learn(self) -> NDArray[np.float32]:
        plan = self._plan()  # (H, steps, batch, k)
        totals = torch.zeros(len(plan), device=plan.device)
        steps = torch.zeros(len(plan), device=plan.device)
        for rows in plan.unbind(1):
            loss, active = self._step(rows)
            totals += loss
            steps += active
        return (totals / steps).cpu().numpy()

    def _plan(self) -> Tensor:
        """Lay out each scorer's shuffled mini-batches of instance rows: (H, steps, batch, k).

        Padding is row M. With the instance loss k is 1 and a batch counts instances; with the bag
        loss it counts patients, each with its k_train instances.
        """
        top = self._ranking.top(int(self._k.max())).cpu()  # (P, H, k)
        place = torch.arange(top.shape[2])
        top = top.masked_fill(place >= self._k.cpu()[:, None, None], len(self._instances))
        orders = [self._shuffled(top[:, scorer], scorer) for scorer in range(top.shape[1])]
        steps = max(len(order) for order in orders)
        plan = orders[0].new_full((len(orders), steps, *orders[0].shape[1:]), len(self._instances))
        for scorer, order in enumerate(orders):
            plan[scorer, : len(order)] = order
        return plan.to(self._instances.device)

    def _shuffled(self, top: Tensor, scorer: int) -> Tensor:
        rows = top[self._train_rows[scorer]]  # (patients, k)
        if self._head.loss == "instance":
            rows = rows[rows < len(self._instances)][:, None]  # (selected, 1)
        order = torch.randperm(len(rows), generator=self._scorers.generators[scorer])
        return _batched(rows[order], self._batch_size, len(self._instances))

    def _step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of every scorer on its rows (H, batch, k); return loss and active, (H,)."""
        real = rows < len(self._instances)
        present = real.any(2)  # (H, batch)
        active = present.any(1).float()
        rows = rows.clamp(max=len(self._instances) - 1)
        chosen = self._instances[rows].float()  # (H, batch, k, C)
        share = real / real.sum(2, keepdim=True).clamp(min=1)  # (H, batch, k)
        inputs = torch.einsum("hbkc,hbk->hbc", chosen, share)  # the mean logit is of the mean input
        weight, bias = self._scorers.folded()
        logits = torch.einsum("hbc,hc->hb", inputs, weight) + bias[:, None]
        targets = self._labels[self._bags.index[rows[:, :, 0]]].float()  # (H, batch)
        per_example = present / present.sum(1, keepdim=True).clamp(min=1)
        slope = (logits.sigmoid() - targets) * per_example  # (H, batch) d loss / d logit
        total = slope.sum(1)
        gradient = torch.einsum("hb,hbc->hc", slope, inputs)
        self._adam.step([self._scorers.scaling.unfold_gradient(gradient, total), total], active)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, reduction="none"
        )
        return (losses * per_example).sum(1), active

    def keep(self, result: FittedHeads) -> None:
        """Write the scorers, folded, into the result."""
        weight, bias = self._scorers.folded()
        for scorer, group in enumerate(self._positions):
            result.weight[group] = weight[scorer].cpu().numpy()
            result.bias[group] = bias[scorer].cpu().numpy()


def _batched(rows: Tensor, batch_size: int, padding: int) -> Tensor:
    """Cut shuffled rows (n, k) into (steps, batch, k), without the incomplete last batch.

    Fewer rows than one batch are padded to it, so that there is always a step.
    """
    steps = max(1, len(rows) // batch_size)
    rows = rows[: steps * batch_size]
    padded = rows.new_full((steps * batch_size, rows.shape[1]), padding)
    padded[: len(rows)] = rows
    return padded.view(steps, batch_size, -1)


class WeightedTrainer:
    """Trains weighted-family fits on batches of whole patients, one lane a split."""

    def __init__(
        self, features: Features, fits: Sequence[Fit], positions: list[int], batch_size: int
    ) -> None:
        # In the order split, aggregator: a split's heads are neighbours, and of those an
        # aggregator's.
        self._positions = sorted(positions, key=lambda p: (fits[p].split.id, fits[p].head.agg))
        own = [fits[position] for position in self._positions]
        self.instances, per_image = features.of_unit(_stack_key(own[0].head).unit)
        self.bags = features.bags.times(per_image)
        self.spans = [slice(start, stop) for start, stop in pairwise(self.bags.offsets.tolist())]
        self.scorers = _Scorers(features, own)
        self.state = AggregatorState.fresh([fit.head for fit in own], features.device)
        self._lanes = [
            _Lane(features, own, columns, self, batch_size)
            for columns in _runs([fit.split.id for fit in own])
        ]
        self._losses = np.zeros(len(own), np.float32)
        self._aggs = [fit.head.agg for fit in own]
        self._curves = np.array([fit.curve for fit in own])

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Train every lane for an epoch and evaluate all heads."""
        losses = [lane.run_epoch() for lane in self._lanes]
        result.losses[self._positions, epoch] = torch.cat(losses).cpu().numpy()
        last = epoch == result.losses.shape[1] - 1
        for agg in dict.fromkeys(self._aggs):
            wanted = [i for i, a in enumerate(self._aggs) if a == agg and (last or self._curves[i])]
            for start in range(0, len(wanted), _COLUMNS_AT_ONCE):
                columns = wanted[start : start + _COLUMNS_AT_ONCE]
                probabilities = self._evaluate(agg, columns)
                result.curves[[self._positions[c] for c in columns], epoch] = probabilities

    @torch.no_grad()
    def _evaluate(self, agg: str, columns: list[int]) -> NDArray[np.float32]:
        """Return every patient's probability by some heads of one aggregator: (columns, P)."""
        chosen = torch.tensor(columns, device=self.instances.device)
        weight, bias = self.scorers.folded()
        logits = _score(self.instances, weight[chosen], bias[chosen])
        patient_logit = AGGREGATORS[agg].patient_logit
        assert patient_logit is not None
        probabilities = patient_logit(self.state.columns(chosen), logits, self.bags).sigmoid()
        return np.asarray(probabilities.T.cpu().numpy())

    def keep(self, result: FittedHeads) -> None:
        """Write the scorers, folded, and the aggregators' state into the result."""
        weight, bias = self.scorers.folded()
        result.weight[self._positions] = weight.cpu().numpy()
        result.bias[self._positions] = bias.cpu().numpy()
        for name, values in result.extras.items():
            values[self._positions] = getattr(self.state, name).cpu().numpy()


class _Lane:
    """The heads of one split: the same patients in the same order."""

    def __init__(
        self,
        features: Features,
        fits: Sequence[Fit],
        columns: slice,
        trainer: WeightedTrainer,
        batch_size: int,
    ) -> None:
        self._trainer = trainer
        scorers, state = trainer.scorers, trainer.state
        self._generator = scorers.generators[columns.start]
        self._train = torch.from_numpy(features.rows_of(fits[columns.start].split.train))
        self._labels = features.labels
        self._batch_size = batch_size
        # Slices share memory with the trainer's tensors: a step here is seen by the evaluation.
        self._weight, self._bias = scorers.weight[columns], scorers.bias[columns]
        self._scaling = Scaling(scorers.scaling.mean[columns], scorers.scaling.scale[columns])
        self._state = replace(state.columns(columns), training=True)
        self._stacks = [
            (AGGREGATORS[fits[columns.start + stack.start].head.agg].patient_logit, stack)
            for stack in _runs([fit.head.agg for fit in fits[columns]])
        ]
        self._adam = StackedAdam(
            [self._weight, self._bias, self._state.gamma, self._state.beta],
            scorers.lr[columns],
            scorers.weight_decay[columns],
        )

    def run_epoch(self) -> Tensor:
        """Train on every patient once, in shuffled batches; return the mean losses (H,)."""
        order = torch.randperm(len(self._train), generator=self._generator)
        rows = _batched(self._train[order][:, None], self._batch_size, -1)[..., 0]
        losses = [self._step(batch[batch >= 0]) for batch in rows]
        return torch.stack(losses).mean(0)

    def _step(self, patients: Tensor) -> Tensor:
        """Take one step on the patients' rows (b,); return the losses (H,)."""
        instances = self._trainer.instances
        bags = Bags(self._trainer.bags.sizes[patients])
        spans = [self._trainer.spans[patient] for patient in patients.tolist()]
        weight, bias = self._scaling.fold(self._weight, self._bias)
        logits = torch.cat([_score(instances[span], weight, bias) for span in spans])  # (m, H)
        targets = self._labels[patients].float()[:, None]  # (b, 1)
        losses, slope, gamma, beta = self._differentiate(logits, bags, targets)
        parts = torch.split(slope.to(instances.dtype), bags.sizes.tolist())
        gradient = torch.zeros_like(weight)
        for span, part in zip(spans, parts, strict=True):
            gradient += part.mT @ instances[span]
        total = slope.sum(0)
        self._adam.step(
            [self._scaling.unfold_gradient(gradient, total), total, gamma, beta],
            torch.ones_like(total),
        )
        return losses

    def _differentiate(
        self, logits: Tensor, bags: Bags, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the losses (H,) and their gradients by logits (m, H), gamma (H,) and beta (H,)."""
        inputs = [
            leaf.detach().requires_grad_() for leaf in (logits, self._state.gamma, self._state.beta)
        ]
        state = replace(self._state, gamma=inputs[1], beta=inputs[2])
        patient_logits = torch.cat(
            [
                function(state.columns(stack), inputs[0][:, stack].contiguous(), bags)
                for function, stack in self._stacks
                if function is not None
            ],
            dim=1,
        )  # (b, H)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            patient_logits, targets.expand_as(patient_logits), reduction="none"
        ).mean(0)
        slope, gamma, beta = torch.autograd.grad(
            losses.sum(), inputs, allow_unused=True, materialize_grads=True
        )
        return losses.detach(), slope, gamma, beta


def _runs(values: Sequence[str]) -> list[slice]:
    """Return the slices of equal neighbours."""
    borders = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [slice(start, stop) for start, stop in pairwise(borders)]
