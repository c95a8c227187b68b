"""What the trainers of all families share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.splits import Split
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampler, Sampling
from lymphfeat.settings import HeadSettings

Tick = Callable[[int, str], None]  # so many fits have finished an epoch, or all; live values


class HeadTrainer(ABC):
    """Trains the fits of one stack; a subclass for each family says how."""

    threaded: ClassVar[bool] = False  # whether it uses all threads by itself
    most: ClassVar[int] = 1024  # fits at a time: more gain little, and all are finished together

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        """Take the fits, which have one `stack_key`, by their positions in the result."""
        self._positions = sorted(fits, key=lambda position: fits[position].split.id)
        self._fits = [fits[position] for position in self._positions]
        self._features, self._labels, self._sampling = features, features.labels, sampling
        self._unit = self.unit_of(self._fits[0].head, sampling)
        self._instances = features.of_unit(self._unit)
        self._views = range(sampling.views if tta else 1)

    @classmethod
    @abstractmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        """Return what the heads of one stack have in common."""

    @classmethod
    def learner_of(cls, head: HeadSettings) -> Hashable:
        """Return what heads that learn the same have in common: they stay together."""
        return head

    @classmethod
    def work_of(cls, epochs: int) -> int:
        """Return how often a fit is reported as progress."""
        return epochs

    @classmethod
    def bytes_of(cls, head: HeadSettings, channels: int, batch_size: int) -> int:
        """Estimate the memory of a fit in training, in bytes."""
        # Weight, two moments, gradient, scale, mean and their temporaries.
        return 4 * channels * 10

    @classmethod
    def unit_of(cls, head: HeadSettings, sampling: Sampling) -> str:
        """Return the unit of the instances that a head is trained and evaluated on."""
        return head.unit

    def __len__(self) -> int:
        return len(self._fits)

    def fit(self, result: FittedHeads, tick: Tick) -> None:
        """Train for all epochs of a result; write losses and probabilities."""
        epochs = result.losses.shape[1]
        for epoch in range(epochs):
            self.run_epoch(epoch, result)
            tick(len(self), f"epoch {epoch + 1} of {epochs}")

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Train for an epoch and evaluate; write losses and probabilities."""
        result.losses[self._positions, epoch] = self._learn()
        self._evaluate(self._instances, epoch, result)

    def evaluate_on(self, features: Features, result: FittedHeads) -> None:
        """Evaluate on other features, into a result of one epoch."""
        self._evaluate(features.of_unit(self._unit), 0, result)

    @abstractmethod
    def keep(self, result: FittedHeads) -> None:
        """Write what the heads have learnt."""

    @abstractmethod
    def _learn(self) -> NDArray[np.float32]:
        """Train for an epoch; return the mean loss of every fit: (n,)."""

    @abstractmethod
    def _probabilities(
        self, instances: Instances, wanted: Sequence[int], view: int, *, last: bool
    ) -> Tensor:
        """Return the patients' probabilities in a view by the wanted of the n fits: (wanted, P).

        `last` says that no epoch follows: then of everyone. Before, those of patients who are not
        in a fit's curve may be NaN.
        """

    def _evaluate(self, instances: Instances, epoch: int, result: FittedHeads) -> None:
        """Write the mean over views for the fits whose curve is requested, in the end for all."""
        last = epoch == result.losses.shape[1] - 1
        wanted = [i for i, fit in enumerate(self._fits) if fit.curve != "nobody" or last]
        views = [self._probabilities(instances, wanted, view, last=last) for view in self._views]
        positions = [self._positions[i] for i in wanted]
        result.curves[positions, epoch] = torch.stack(views).mean(0).cpu().numpy()

    def _evaluated(self, fit: Fit, *, last: bool) -> NDArray[np.int64]:
        """Return the rows of the patients whom a fit is to be evaluated on."""
        if last or fit.curve == "everyone":
            return np.arange(len(self._labels))
        return self._features.rows_of(fit.split.validation)

    def _sampler(self, split: Split, generator: torch.Generator) -> Sampler:
        train = self._features.rows_of(split.train)
        return Sampler(train, self._instances, self._sampling, generator)


def runs(values: Sequence[object]) -> Iterator[slice]:
    """Yield the slices of equal neighbours."""
    borders = [i for i in range(1, len(values)) if values[i] != values[i - 1]]
    return (slice(*ends) for ends in pairwise([0, *borders, len(values)]))
