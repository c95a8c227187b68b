"""Training of the weighted family (METHOD §2 B) on whole patients, one lane per split.

A lane's heads see the same patients in the same order. All lanes take their steps together, and a
patient that several lanes need in a step is read once for all of them: reading the features is the
main cost, because there are few scorers. The gradient of a linear scorer is written out (Gᵀ X), so
that features are read twice per step and nothing of their size is allocated.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Batch, Sampler, Sampling
from lymphfeat.heads.engine.scorers import Scorers, score
from lymphfeat.heads.registry import AGGREGATORS, AggregatorState
from lymphfeat.settings import HeadSettings

_LANE_HEADS = 64  # at most, in one lane
_STEP_VALUES = 24 << 20  # logits held at a time, of several lanes' batches
_EVALUATED_HEADS = 256  # at a time
_SMALL = 8  # instances of a patient, below which reading is cheaper than sharing what is read


def unit_of(head: HeadSettings, sampling: Sampling) -> str:
    """Return the unit to read: a mean of scores is the score of the mean, also over a patient."""
    if head.agg != "mean":
        return head.unit
    return "patient" if sampling.whole else "image"


class WeightedTrainer:
    """Trains fits of one unit."""

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
        # Sorted by split, then aggregator: the heads of a split are adjacent, and within it those
        # of an aggregator.
        self._positions = sorted(positions, key=lambda p: (fits[p].split.id, fits[p].head.agg))
        own = [fits[position] for position in self._positions]
        self._unit = unit_of(own[0].head, sampling)
        self._instances = features.of_unit(self._unit)
        self._sharing = sampling.whole and self._instances.mean_size >= _SMALL
        self._views = range(sampling.views if tta else 1)
        self._labels = features.labels
        self._scorers = Scorers(features, own)
        self._state = AggregatorState.fresh([fit.head for fit in own], features.device)
        self._adam = self._scorers.optimizer(own, self._state.gamma, self._state.beta)
        self._lanes = [
            _Lane(
                sampler=Sampler(
                    features.rows_of(own[columns.start].split.train),
                    self._instances,
                    sampling,
                    self._scorers.generators[columns.start],
                ),
                columns=columns,
                stacks=tuple(_runs([fit.head.agg for fit in own[columns]])),
                aggs=tuple(fit.head.agg for fit in own[columns]),
            )
            for columns in _at_most(_runs([fit.split.id for fit in own]), _LANE_HEADS)
        ]
        self._aggs = [fit.head.agg for fit in own]
        self._curves = [fit.curve for fit in own]

    # --- training ---------------------------------------------------------------------------------

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Train every lane for an epoch and evaluate all heads."""
        plans = [lane.sampler.epoch() for lane in self._lanes]
        totals = torch.zeros(len(self._aggs), device=self._labels.device)
        for step in range(max(len(plan) for plan in plans)):
            lanes = [
                lane for lane, plan in zip(self._lanes, plans, strict=True) if step < len(plan)
            ]
            totals += self._step(lanes, [plan[step] for plan in plans if step < len(plan)])
        for lane, plan in zip(self._lanes, plans, strict=True):
            totals[lane.columns] /= len(plan)
        result.losses[self._positions, epoch] = totals.cpu().numpy()
        self._evaluate(epoch, result)

    def _step(self, lanes: Sequence["_Lane"], batches: Sequence[Batch]) -> Tensor:
        """Take one step of some lanes on a batch each; return the losses (H,), 0 of the others."""
        weight, bias = self._scorers.folded()
        slopes = _Slopes.zeros(weight)
        for block in self._blocks(lanes, batches):
            self._differentiate(
                [lanes[i] for i in block], [batches[i] for i in block], weight, bias, slopes
            )
        gradient = self._scorers.scaling.unfold_gradient(slopes.weight, slopes.bias)
        active = torch.zeros_like(bias)
        for lane in lanes:
            active[lane.columns] = 1
        self._adam.step([gradient, slopes.bias, slopes.gamma, slopes.beta], active)
        return slopes.loss

    def _blocks(self, lanes: Sequence["_Lane"], batches: Sequence[Batch]) -> Iterator[list[int]]:
        """Cut the lanes of a step into blocks whose logits fit in memory."""
        block: list[int] = []
        held = 0
        for i, (lane, batch) in enumerate(zip(lanes, batches, strict=True)):
            values = int(batch.sizes.sum()) * self._instances.per_image * lane.width
            if block and (held + values > _STEP_VALUES or not self._sharing):
                yield block
                block, held = [], 0
            block.append(i)
            held += values
        yield block

    def _differentiate(
        self,
        lanes: Sequence["_Lane"],
        batches: Sequence[Batch],
        weight: Tensor,
        bias: Tensor,
        slopes: "_Slopes",
    ) -> None:
        """Add the losses of some lanes and their gradients by the folded scorers."""
        reads: _Reads = (
            _SharedReads(self._instances, lanes, batches)
            if self._sharing
            else _OwnReads(self._instances, lanes[0], batches[0])
        )
        of_logits = []
        for lane, batch, logits in zip(lanes, batches, reads.logits(weight, bias), strict=True):
            bags = Bags.of(batch.sizes * self._instances.per_image, logits.device)
            labels = self._labels[batch.patients.to(self._labels.device)]  # (b,)
            counts = self._scorers.class_weights[lane.columns][:, labels].T  # (b, K)
            of_logits.append(lane.differentiate(self._state, logits, bags, labels, counts, slopes))
        reads.add_gradient(of_logits, slopes.weight)

    # --- evaluation -------------------------------------------------------------------------------

    def evaluate_on(self, features: Features, result: FittedHeads) -> None:
        """Evaluate the trained heads on other features, into a result of one epoch."""
        self._instances = features.of_unit(self._unit)
        self._evaluate(0, result)

    def _evaluate(self, epoch: int, result: FittedHeads) -> None:
        """Write every patient's probability for the heads whose curve is requested."""
        last = epoch == result.losses.shape[1] - 1
        wanted = [i for i, curve in enumerate(self._curves) if curve or last]
        wanted.sort(key=lambda i: self._aggs[i])
        for start in range(0, len(wanted), _EVALUATED_HEADS):
            columns = wanted[start : start + _EVALUATED_HEADS]
            positions = [self._positions[column] for column in columns]
            probabilities = torch.stack([self._probabilities(columns, v) for v in self._views])
            result.curves[positions, epoch] = probabilities.mean(0).T.cpu().numpy()

    @torch.no_grad()
    def _probabilities(self, columns: Sequence[int], view: int) -> Tensor:
        """Return every patient's probability in a view by some heads: (P, n)."""
        chosen = torch.tensor(columns, device=self._labels.device)
        weight, bias = (part[chosen] for part in self._scorers.folded())
        state = self._state.columns(chosen)
        stacks = _runs([self._aggs[column] for column in columns])
        parts = []
        for _, instances, bags in self._instances.chunks(len(columns), view):
            logits = score(instances, weight, bias)
            by_agg = [
                _patient_logit(self._aggs[columns[stack.start]], state, stack, logits, bags)
                for stack in stacks
            ]
            parts.append(torch.cat(by_agg, dim=1))
        return torch.cat(parts).sigmoid()

    def keep(self, result: FittedHeads) -> None:
        """Write the scorers, folded, and the aggregators' state into the result."""
        weight, bias = self._scorers.folded()
        result.weight[self._positions] = weight.cpu().numpy()
        result.bias[self._positions] = bias.cpu().numpy()
        for name, values in result.extras.items():
            values[self._positions] = getattr(self._state, name).cpu().numpy()


def _patient_logit(
    agg: str, state: AggregatorState, stack: slice, logits: Tensor, bags: Bags
) -> Tensor:
    function = AGGREGATORS[agg].patient_logit
    assert function is not None
    return function(state.columns(stack), logits[:, stack].contiguous(), bags)


@dataclass(frozen=True)
class _Slopes:
    """The losses of a step and their gradients, of all heads of a trainer."""

    loss: Tensor  # (H,)
    weight: Tensor  # (H, C), of the folded scorers
    bias: Tensor  # (H,)
    gamma: Tensor  # (H,)
    beta: Tensor  # (H,)

    @classmethod
    def zeros(cls, weight: Tensor) -> "_Slopes":
        n = len(weight)
        return cls(weight.new_zeros(n), torch.zeros_like(weight), *weight.new_zeros(3, n).unbind())


@dataclass(frozen=True, kw_only=True)
class _Lane:
    """Heads of one split: the same patients in the same order."""

    sampler: Sampler
    columns: slice  # among the trainer's heads
    aggs: tuple[str, ...]  # of its heads
    stacks: tuple[slice, ...]  # its heads of one aggregator each

    @property
    def width(self) -> int:
        return len(self.aggs)

    def differentiate(
        self,
        everything: AggregatorState,
        logits: Tensor,
        bags: Bags,
        labels: Tensor,
        counts: Tensor,
        slopes: _Slopes,
    ) -> Tensor:
        """Return the gradient (m, K) of the losses by logits (m, K); write the others to `slopes`.

        `counts` (b, K) is how much each patient's loss counts.
        """
        own = replace(everything.columns(self.columns), training=True)
        leaves = [leaf.detach().requires_grad_() for leaf in (logits, own.gamma, own.beta)]
        state = replace(own, gamma=leaves[1], beta=leaves[2])
        patient_logits = torch.cat(
            [
                _patient_logit(self.aggs[stack.start], state, stack, leaves[0], bags)
                for stack in self.stacks
            ],
            dim=1,
        )  # (b, K)
        targets = labels[:, None].float().expand_as(patient_logits)
        losses = binary_cross_entropy_with_logits(patient_logits, targets, counts, reduction="none")
        losses = losses.mean(0)
        slope, gamma, beta = torch.autograd.grad(
            losses.sum(), leaves, allow_unused=True, materialize_grads=True
        )
        slopes.loss[self.columns] = losses.detach()
        slopes.bias[self.columns] = slope.sum(0)
        slopes.gamma[self.columns], slopes.beta[self.columns] = gamma, beta
        return slope


# --- reading --------------------------------------------------------------------------------------


class _Reads(Protocol):
    """The instances of one step, read forward and then backward."""

    def logits(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Return each lane's logits (m, K) by all folded scorers (H, C), (H,)."""

    def add_gradient(self, slopes: Sequence[Tensor], gradient: Tensor) -> None:
        """Add the share of each lane's slopes (m, K) to the gradient of all scorers (H, C)."""


class _SharedReads:
    """Whole patients, each read once for all lanes that need it."""

    def __init__(
        self, instances: Instances, lanes: Sequence[_Lane], batches: Sequence[Batch]
    ) -> None:
        self._instances, self._lanes = instances, lanes
        self._lengths = [int(batch.sizes.sum()) * instances.per_image for batch in batches]
        wanted: dict[int, list[tuple[int, slice]]] = defaultdict(list)
        for lane, batch in enumerate(batches):
            ends = np.cumsum([0, *(batch.sizes * instances.per_image)]).tolist()
            for patient, (start, stop) in zip(batch.patients.tolist(), pairwise(ends), strict=True):
                wanted[patient].append((lane, slice(start, stop)))
        self._wanted = dict(wanted)  # patient -> lanes, and where in the lane's batch

    def logits(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        out = [
            weight.new_empty(length, lane.width)
            for length, lane in zip(self._lengths, self._lanes, strict=True)
        ]
        for patient, uses in self._wanted.items():
            columns = [self._lanes[lane].columns for lane, _ in uses]
            weights = torch.cat([weight[own] for own in columns])  # (columns, C)
            biases = torch.cat([bias[own] for own in columns])
            values = score(self._instances.of_patient(patient), weights, biases)
            start = 0
            for lane, rows in uses:
                stop = start + self._lanes[lane].width
                out[lane][rows] = values[:, start:stop]
                start = stop
        return out

    def add_gradient(self, slopes: Sequence[Tensor], gradient: Tensor) -> None:
        for patient, uses in self._wanted.items():
            instances = self._instances.of_patient(patient)
            slope = torch.cat([slopes[lane][rows] for lane, rows in uses], dim=1)  # (m, columns)
            share = (slope.to(instances.dtype).mT @ instances).float()
            start = 0
            for lane, _ in uses:
                stop = start + self._lanes[lane].width
                gradient[self._lanes[lane].columns] += share[start:stop]
                start = stop


class _OwnReads:
    """One lane's images, gathered."""

    def __init__(self, instances: Instances, lane: _Lane, batch: Batch) -> None:
        self._lane = lane
        images = instances.images_of(batch.patients) if batch.images is None else batch.images
        self._instances = instances.source.gather(images, batch.views).flatten(0, 1)  # (m, C)

    def logits(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [score(self._instances, weight[self._lane.columns], bias[self._lane.columns])]

    def add_gradient(self, slopes: Sequence[Tensor], gradient: Tensor) -> None:
        share = slopes[0].to(self._instances.dtype).mT @ self._instances
        gradient[self._lane.columns] += share.float()


def _runs(values: Sequence[str]) -> list[slice]:
    """Return the slices of equal neighbours."""
    borders = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [slice(start, stop) for start, stop in pairwise(borders)]


def _at_most(runs: Sequence[slice], width: int) -> list[slice]:
    """Cut slices that are wider."""
    return [
        slice(start, min(start + width, run.stop))
        for run in runs
        for start in range(run.start, run.stop, width)
    ]
