"""Training of the weighted family (METHOD §2 B) on whole patients, one lane per split.

A lane's heads see the same patients in the same order. All lanes take their steps together, and a
patient that several lanes need in a step is read once for all of them: reading the features is the
main cost, because there are few scorers. Gradients are written out, of a linear scorer (G X) and of
every aggregator (`closed_forms`). On a CPU the patients of a step are shared out over threads, each
of which computes alone; what they find is added up in one order, so results do not depend on how
many there are.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.heads.aggregators.weighted import AggregatorState
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.reads import (
    Folded,
    Kinds,
    Moments,
    Numbers,
    Read,
    Slopes,
    even_runs,
)
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Batch, Sampler, Sampling
from lymphfeat.heads.engine.scorers import Scorers, score_rows
from lymphfeat.heads.engine.trainer import HeadTrainer, Tick, runs
from lymphfeat.heads.registry import WeightedAggregator, aggregator_of
from lymphfeat.runtime.devices import cpu_threads, work_alone
from lymphfeat.runtime.threads import in_order, map_in_order
from lymphfeat.settings import HeadSettings

_LANE_HEADS = 64  # at most, in one lane
_STEP_VALUES = 24 << 20  # logits held at a time, of several lanes' batches
_EVALUATED_HEADS = 256  # at a time
_SMALL = 8  # instances of a patient, below which reading is cheaper than sharing what is read
_MOST_THREADS = 8  # more wait for each other: Python hands out one operation at a time
_LARGE = 256  # instances of a patient, from which evaluating the patients apart is cheaper
_TOGETHER = 4  # reads handed to a thread at a time


class WeightedHeadTrainer(HeadTrainer):
    """Trains fits of one unit."""

    threaded = True

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        super().__init__(features, fits, sampling, tta=tta)
        self._sharing = sampling.whole and self._instances.mean_size >= _SMALL
        self._scorers = Scorers(features, self._fits)
        heads = [fit.head for fit in self._fits]
        self._state = AggregatorState.fresh(heads, features.device)
        self._adam = self._scorers.optimizer(self._fits, self._state.gamma, self._state.beta)
        self._kinds = Kinds(heads)
        self._lanes = [
            _Lane(self._sampler(fit.split, self._scorers.generators[columns.start]), columns)
            for own in runs([fit.split.id for fit in self._fits])
            for columns in _at_most(own, _LANE_HEADS)
            for fit in [self._fits[columns.start]]
        ]
        on_cpu = features.device.type == "cpu"
        threads = min(torch.get_num_threads(), _MOST_THREADS) if on_cpu else 1
        self._threads = threads if threads > 1 else 0  # the caller works alone

    @classmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        return cls.unit_of(head, sampling)

    @classmethod
    def unit_of(cls, head: HeadSettings, sampling: Sampling) -> str:
        if not aggregator_of(head, WeightedAggregator).uniform:
            return head.unit
        return "patient" if sampling.whole else "image"

    def fit(self, result: FittedHeads, tick: Tick) -> None:
        with cpu_threads(1):
            super().fit(result, tick)

    # --- training ---------------------------------------------------------------------------------

    def _learn(self) -> NDArray[np.float32]:
        plans = [lane.sampler.epoch() for lane in self._lanes]
        totals = torch.zeros(len(self), device=self._labels.device)
        for steps in zip_longest(*plans):  # a batch of every lane, None of one that has no more
            pairs = zip(self._lanes, steps, strict=True)
            totals += self._step([(lane, batch) for lane, batch in pairs if batch is not None])
        for lane, plan in zip(self._lanes, plans, strict=True):
            totals[lane.columns] /= len(plan)
        return np.asarray(totals.cpu().numpy())

    def _step(self, batches: "_Batches") -> Tensor:
        """Take one step of some lanes; return the losses (H,), 0 of the other lanes."""
        weight, _ = folded = self._scorers.folded()
        slopes = Slopes.zeros(weight)
        for found in self._slopes(batches, folded):
            slopes.add(found)
        loss, bias, gamma, beta, seen = slopes.others.unbind()
        gradient = self._scorers.scaling.unfold_gradient(slopes.weight, bias)
        self._adam.step([gradient, bias, gamma, beta], seen.clamp(max=1))
        return loss

    def _slopes(self, batches: "_Batches", folded: Folded) -> Iterator[Slopes]:
        """Yield the losses of some lanes' batches and their gradients, in parts to be added up."""
        if self._sharing:
            for block in self._blocks(batches):
                yield from self._differentiate(self._shared_reads(block), folded, self._threads)
            return
        parts = in_order(
            lambda own: list(self._differentiate([self._own_read(*own)], folded, 0)),
            batches,
            threads=self._threads,
            ahead=2 * self._threads,
            name="fit",
            begin=work_alone,
        )
        for part in parts:
            yield from part

    def _blocks(self, batches: "_Batches") -> Iterator["_Batches"]:
        """Cut the lanes of a step into blocks whose logits fit in memory."""
        block: list[tuple[_Lane, Batch]] = []
        held = 0
        for lane, batch in batches:
            values = int(batch.sizes.sum()) * self._instances.per_image * lane.width
            if block and held + values > _STEP_VALUES:
                yield block
                block, held = [], 0
            block.append((lane, batch))
            held += values
        yield block

    def _differentiate(
        self, reads: Sequence[Read], folded: Folded, threads: int
    ) -> Iterator[Slopes]:
        """Yield the losses of whole batches and their gradients by the folded scorers."""
        share = partial(
            map_in_order, threads=threads, together=_TOGETHER, name="fit", begin=work_alone
        )

        def score(read: Read) -> tuple[Tensor, Moments]:
            values = read.logits(folded)  # (K, m)
            return values, read.moments(values)

        logits, moments = zip(*share(score, reads), strict=True)
        state = self._normalised([*chain(*moments)])

        def slopes_of(own: tuple[Read, Tensor]) -> Slopes:
            read, values = own
            labels = self._labels[read.patients]  # (b,)
            counts = self._scorers.class_weights[read.columns][:, labels]  # (K, b)
            return read.slopes(state, values, labels.float(), counts / read.batch[:, None])

        yield from share(slopes_of, list(zip(reads, logits, strict=True)))

    def _normalised(self, own: Moments) -> AggregatorState:
        """Return the state in which heads are normalised by the logits of their batches.

        The running mean and variance move towards the batches', in place.
        """
        if not own:
            return self._state
        moments = _Moments.of(own, len(self))
        momentum = self._state.momentum * (moments.count > 0)
        self._state.running_mean.lerp_(moments.mean, momentum)
        self._state.running_var.lerp_(moments.variance, momentum)
        return replace(self._state, running_mean=moments.mean, running_var=moments.variance)

    # --- reading ----------------------------------------------------------------------------------

    def _shared_reads(self, batches: "_Batches") -> list[Read]:
        """Read whole patients, each once for all lanes that need it."""
        patients = np.concatenate(
            [np.repeat(b.patients.numpy(), lane.width) for lane, b in batches]
        )
        columns = np.concatenate([np.tile(lane.numbers, len(b.sizes)) for lane, b in batches])
        batch = np.concatenate(
            [np.full(lane.width * len(b.sizes), len(b.sizes)) for lane, b in batches]
        )
        order = np.lexsort((columns, self._kinds.ranks[columns], patients))
        patients, columns = patients[order], columns[order]
        rows, heads, of_heads = map(self._tensor, (patients, columns, batch[order]))
        sizes = np.diff(self._instances.images)[patients] * self._instances.per_image
        return [
            Read(
                instances=partial(self._instances.of_patient, int(patients[own.start])),
                sizes=[int(sizes[own.start])],
                patients=rows[own][:1],
                columns=heads[own],
                parts=self._kinds.parts(columns[own]),
                batch=of_heads[own],
            )
            for own in runs(patients.tolist())
        ]

    def _own_read(self, lane: "_Lane", batch: Batch) -> Read:
        """Gather the images of one lane's batch."""
        images = self._instances.images_of(batch.patients) if batch.images is None else batch.images
        values = self._instances.source.gather(images, batch.views).flatten(0, 1)  # (m, C)
        columns = self._kinds.sorted(lane.numbers)
        return Read(
            instances=lambda: values,
            sizes=(batch.sizes * self._instances.per_image).tolist(),
            patients=batch.patients.to(values.device),
            columns=self._tensor(columns),
            parts=self._kinds.parts(columns),
            batch=self._tensor(np.full(lane.width, len(batch.sizes))),
        )

    def _tensor(self, values: Numbers) -> Tensor:
        """Bring numbers to the device."""
        return torch.from_numpy(values).to(self._labels.device)

    # --- evaluation -------------------------------------------------------------------------------

    def _probabilities(
        self, instances: Instances, wanted: Sequence[int], view: int, *, last: bool
    ) -> Tensor:
        weight, bias = self._scorers.folded()
        result = bias.new_full((len(self), len(self._labels)), torch.nan)

        def score(work: "_Evaluation") -> Tensor:
            columns, patients = work
            values, bags = instances.read(patients, view)
            logits = score_rows(values, weight[columns], bias[columns])  # (k, m)
            return self._totals(columns, logits, bags).sigmoid()

        work = [*self._evaluations(instances, wanted, last=last)]
        scored = in_order(
            score,
            work,
            threads=self._threads,
            ahead=self._threads + 1,
            name="score",
            begin=work_alone,
        )
        for (columns, patients), probability in zip(work, scored, strict=True):
            result[columns[:, None], patients] = probability
        return result[list(wanted)]

    def _evaluations(
        self, instances: Instances, wanted: Sequence[int], *, last: bool
    ) -> Iterator["_Evaluation"]:
        """Yield heads, sorted, with patients whom they are to be evaluated on."""
        columns = np.array(wanted, np.int64)
        own = np.zeros((len(columns), len(self._labels)), np.bool_)
        for row, i in zip(own, wanted, strict=True):
            row[self._evaluated(self._fits[i], last=last)] = True
        everyone = own.all(1) | (instances.mean_size < _LARGE)
        order = self._kinds.sorted(columns[everyone])
        for some in _at_most(slice(0, len(order)), _EVALUATED_HEADS):
            for patients in instances.cut(np.arange(own.shape[1]), some.stop - some.start):
                yield order[some], patients
        for patient, its in enumerate(own[~everyone].T):
            if its.any():
                yield self._kinds.sorted(columns[~everyone][its]), np.array([patient])

    def _totals(self, columns: Numbers, logits: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits by some heads, sorted: logits (k, m) -> (k, b)."""
        totals = logits.new_empty(len(logits), bags.n_bags)
        for kind, part in self._kinds.parts(columns):
            its = self._state.columns(self._tensor(columns[part]))
            for some, rows in even_runs(bags.sizes.tolist()):
                own = logits[part, rows]  # (k', n · u)
                own = own.reshape(len(own), some.stop - some.start, -1)
                totals[part, some] = kind.aggregate(its, own).total
        return totals

    def keep(self, result: FittedHeads) -> None:
        self._scorers.keep(result, self._positions, range(len(self)))
        for name, values in result.extras.items():
            values[self._positions] = getattr(self._state, name).cpu().numpy()


@dataclass(frozen=True)
class _Lane:
    """Heads of one split: the same patients in the same order."""

    sampler: Sampler
    columns: slice  # among the trainer's heads

    @property
    def numbers(self) -> Numbers:
        return np.arange(self.columns.start, self.columns.stop)

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)


_Evaluation = tuple[Numbers, Numbers]  # heads, and the patients whom they are evaluated on
_Batches = Sequence[tuple[_Lane, Batch]]  # of the lanes that take a step together


@dataclass(frozen=True)
class _Moments:
    """The mean and the biased variance of heads' logits over the batches they see: (H,) each."""

    count: Tensor  # of logits; 0 of heads without a batch
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, parts: Moments, heads: int) -> "_Moments":
        """Take what `Read.moments` yields of all reads."""
        columns = torch.cat([own for own, _ in parts])
        n, mean, variance = torch.cat([values for _, values in parts], 1).unbind()

        def average(values: Tensor) -> Tensor:
            return values.new_zeros(heads).index_add(0, columns, n * values) / count.clamp(min=1)

        count = n.new_zeros(heads).index_add(0, columns, n)
        means = average(mean)
        return cls(count, means, average(variance + (mean - means[columns]) ** 2))


def _at_most(run: slice, width: int) -> Iterator[slice]:
    """Cut a slice that is wider."""
    for start in range(run.start, run.stop, width):
        yield slice(start, min(start + width, run.stop))
