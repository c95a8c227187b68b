"""Training of the weighted family (METHOD §2 B) on whole patients, one lane per split.

A lane's heads see the same patients in the same order. All lanes take their steps together, and a
patient that several lanes need in a step is read once for all of them: reading the features is the
main cost, because there are few scorers. The gradient of a linear scorer is written out (Gᵀ X), so
that features are read twice per step and nothing of their size is allocated.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.heads.aggregators.weighted import AggregatorState
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Batch, Sampler, Sampling
from lymphfeat.heads.engine.scorers import Scorers, score
from lymphfeat.heads.engine.trainer import HeadTrainer, runs
from lymphfeat.heads.registry import WeightedAggregator, aggregator_of
from lymphfeat.settings import HeadSettings

_LANE_HEADS = 64  # at most, in one lane
_STEP_VALUES = 24 << 20  # logits held at a time, of several lanes' batches
_EVALUATED_HEADS = 256  # at a time
_SMALL = 8  # instances of a patient, below which reading is cheaper than sharing what is read


class WeightedHeadTrainer(HeadTrainer):
    """Trains fits of one unit."""

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        super().__init__(features, fits, sampling, tta=tta)
        self._sharing = sampling.whole and self._instances.mean_size >= _SMALL
        self._scorers = Scorers(features, self._fits)
        self._heads = [fit.head for fit in self._fits]
        self._state = AggregatorState.fresh(self._heads, features.device)
        self._adam = self._scorers.optimizer(self._fits, self._state.gamma, self._state.beta)
        self._lanes = [
            self._make_lane(self._fits[columns.start], columns)
            for own in runs([fit.split.id for fit in self._fits])
            for columns in _at_most(own, _LANE_HEADS)
        ]

    def _make_lane(self, fit: Fit, columns: slice) -> "_Lane":
        sampler = self._sampler(fit.split, self._scorers.generators[columns.start])
        return _Lane(sampler, columns, _stacks(self._heads[columns]))

    @classmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        return cls.unit_of(head, sampling)

    @classmethod
    def unit_of(cls, head: HeadSettings, sampling: Sampling) -> str:
        if not aggregator_of(head, WeightedAggregator).uniform:
            return head.unit
        return "patient" if sampling.whole else "image"

    @staticmethod
    def _place_of(fit: Fit) -> tuple[str, ...]:
        return fit.split.id, fit.head.agg

    # --- training ---------------------------------------------------------------------------------

    def _learn(self) -> NDArray[np.float32]:
        plans = [lane.sampler.epoch() for lane in self._lanes]
        totals = torch.zeros(len(self), device=self._labels.device)
        for steps in zip_longest(
            *plans
        ):  # a batch, or None where a lane has no more, of every lane
            pairs = zip(self._lanes, steps, strict=True)
            totals += self._step([(lane, batch) for lane, batch in pairs if batch is not None])
        for lane, plan in zip(self._lanes, plans, strict=True):
            totals[lane.columns] /= len(plan)
        return np.asarray(totals.cpu().numpy())

    def _step(self, batches: "_Batches") -> Tensor:
        """Take one step of some lanes; return the losses (H,), 0 of the other lanes."""
        folded = self._scorers.folded()
        slopes = _Slopes.zeros(folded[0])
        for block in self._blocks(batches):
            self._differentiate(block, folded, slopes)
        gradient = self._scorers.scaling.unfold_gradient(slopes.weight, slopes.bias)
        active = torch.zeros_like(slopes.bias)
        for lane, _ in batches:
            active[lane.columns] = 1
        self._adam.step([gradient, slopes.bias, slopes.gamma, slopes.beta], active)
        return slopes.loss

    def _blocks(self, batches: "_Batches") -> Iterator["_Batches"]:
        """Cut the lanes of a step into blocks whose logits fit in memory."""
        block: list[tuple[_Lane, Batch]] = []
        held = 0
        for lane, batch in batches:
            values = int(batch.sizes.sum()) * self._instances.per_image * lane.width
            if block and (held + values > _STEP_VALUES or not self._sharing):
                yield block
                block, held = [], 0
            block.append((lane, batch))
            held += values
        yield block

    def _differentiate(
        self, batches: "_Batches", folded: tuple[Tensor, Tensor], slopes: "_Slopes"
    ) -> None:
        """Add the losses of some lanes and their gradients by the folded scorers."""
        reads: _Reads = (
            _SharedReads(self._instances, batches)
            if self._sharing
            else _OwnReads(self._instances, *batches[0])
        )
        of_logits = []
        for (lane, batch), logits in zip(batches, reads.logits(*folded), strict=True):
            bags = Bags.of(batch.sizes * self._instances.per_image, logits.device)
            labels = self._labels[batch.patients.to(self._labels.device)]  # (b,)
            counts = self._scorers.class_weights[lane.columns][:, labels].T  # (b, K)
            targets = _Targets(labels, counts)
            of_logits.append(lane.differentiate(self._state, logits, bags, targets, slopes))
        reads.add_gradient(of_logits, slopes.weight)

    # --- evaluation -------------------------------------------------------------------------------

    def _probabilities(
        self, instances: Instances, wanted: Sequence[int], view: int, *, last: bool
    ) -> Tensor:
        result = self._scorers.bias.new_empty(len(wanted), len(self._labels))
        order = sorted(range(len(wanted)), key=lambda place: self._heads[wanted[place]].agg)
        for some in _at_most(slice(0, len(order)), _EVALUATED_HEADS):
            columns = [wanted[place] for place in order[some]]
            result[order[some]] = self._score(instances, columns, view).T
        return result

    def _score(self, instances: Instances, columns: Sequence[int], view: int) -> Tensor:
        """Return every patient's probability in a view by some heads: (P, n)."""
        chosen = torch.tensor(columns, device=self._labels.device)
        weight, bias = (part[chosen] for part in self._scorers.folded())
        state = self._state.columns(chosen)
        stacks = _stacks([self._heads[column] for column in columns])
        parts = [
            _patient_logits(stacks, state, score(values, weight, bias), bags)
            for _, values, bags in instances.chunks(len(columns), view)
        ]
        return torch.cat(parts).sigmoid()

    def keep(self, result: FittedHeads) -> None:
        self._scorers.keep(result, self._positions, range(len(self)))
        for name, values in result.extras.items():
            values[self._positions] = getattr(self._state, name).cpu().numpy()


@dataclass(frozen=True)
class _Stack:
    """Neighbouring heads of one aggregator."""

    aggregator: WeightedAggregator
    columns: slice


def _stacks(heads: Sequence[HeadSettings]) -> list[_Stack]:
    return [
        _Stack(aggregator_of(heads[columns.start], WeightedAggregator), columns)
        for columns in runs([head.agg for head in heads])
    ]


def _patient_logits(
    stacks: Sequence[_Stack], state: AggregatorState, logits: Tensor, bags: Bags
) -> Tensor:
    """Aggregate instance logits (m, K) of heads in stacks to patient logits (b, K)."""
    parts = [
        stack.aggregator.patient_logit(
            state.columns(stack.columns), logits[:, stack.columns].contiguous(), bags
        )
        for stack in stacks
    ]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Targets:
    """What the patients of a batch should be, and how much each counts in the loss."""

    labels: Tensor  # (b,)
    counts: Tensor  # (b, K)


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


@dataclass(frozen=True)
class _Lane:
    """Heads of one split: the same patients in the same order."""

    sampler: Sampler
    columns: slice  # among the trainer's heads
    stacks: list[_Stack]

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)

    def differentiate(
        self,
        everything: AggregatorState,
        logits: Tensor,
        bags: Bags,
        targets: _Targets,
        slopes: _Slopes,
    ) -> Tensor:
        """Return the gradient (m, K) of the losses by logits (m, K); write others to `slopes`."""
        own = replace(everything.columns(self.columns), training=True)
        leaves = [leaf.detach().requires_grad_() for leaf in (logits, own.gamma, own.beta)]
        state = replace(own, gamma=leaves[1], beta=leaves[2])
        patient_logits = _patient_logits(self.stacks, state, leaves[0], bags)  # (b, K)
        labels = targets.labels[:, None].float().expand_as(patient_logits)
        losses = binary_cross_entropy_with_logits(
            patient_logits, labels, targets.counts, reduction="none"
        ).mean(0)
        slope, gamma, beta = torch.autograd.grad(
            losses.sum(), leaves, allow_unused=True, materialize_grads=True
        )
        slopes.loss[self.columns] = losses.detach()
        slopes.bias[self.columns] = slope.sum(0)
        slopes.gamma[self.columns], slopes.beta[self.columns] = gamma, beta
        return slope


_Batches = Sequence[tuple[_Lane, Batch]]  # of the lanes that take a step together


# --- reading --------------------------------------------------------------------------------------


class _Reads(Protocol):
    """The instances of one step, read forward and then backward."""

    def logits(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Return each lane's logits (m, K) by all folded scorers (H, C), (H,)."""

    def add_gradient(self, slopes: Sequence[Tensor], gradient: Tensor) -> None:
        """Add the share of each lane's slopes (m, K) to the gradient of all scorers (H, C)."""


class _SharedReads:
    """Whole patients, each read once for all lanes that need it."""

    def __init__(self, instances: Instances, batches: _Batches) -> None:
        self._instances, self._lanes = instances, [lane for lane, _ in batches]
        self._lengths = [int(batch.sizes.sum()) * instances.per_image for _, batch in batches]
        wanted: dict[int, list[tuple[int, slice]]] = defaultdict(list)
        for lane, (_, batch) in enumerate(batches):
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


def _at_most(run: slice, width: int) -> Iterator[slice]:
    """Cut a slice that is wider."""
    for start in range(run.start, run.stop, width):
        yield slice(start, min(start + width, run.stop))
