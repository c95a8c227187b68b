"""The head engine: fits many heads together on cached feature maps.

A *fit* is one head's settings on one split. Fits of one family, unit and way of learning are laid
side by side as one head axis H (`ranking`, `weighted`); `networks` share what they read. Every fit
draws its own initialisation and order from a generator seeded by its split alone, so fitting many
together gives what fitting one alone gives; and a grid can be cut into blocks as memory demands.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from lymphfeat.heads import AGGREGATORS
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import HeadSettings
from lymphfeat.training.features import Features
from lymphfeat.training.fits import Fit, FittedHeads
from lymphfeat.training.networks import NetworkTrainer
from lymphfeat.training.ranking import RankingTrainer, learning
from lymphfeat.training.sampling import Sampling
from lymphfeat.training.weighted import WeightedTrainer, unit_of


class Trainer(Protocol):
    """What trains the fits of one stack."""

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Train for an epoch and evaluate; write losses and probabilities."""

    def keep(self, result: FittedHeads) -> None:
        """Write what was learnt."""


TRAINERS: dict[str, type[RankingTrainer] | type[WeightedTrainer] | type[NetworkTrainer]] = {
    "ranking": RankingTrainer,
    "weighted": WeightedTrainer,
    "network": NetworkTrainer,
}


def fit_heads(
    features: Features,
    fits: Sequence[Fit],
    *,
    epochs: int,
    batch_size: int = 16,
    images_per_patient: int | None = None,
    views: int = 1,
    tta: bool = False,
    progress: Progress = silent,
) -> FittedHeads:
    """Fit all heads together; keep every patient's probability after every epoch.

    With several `views` one of them is drawn for every image at every step; evaluation sees the
    identity, or with `tta` takes the mean over the views. Progress counts heads × epochs.
    """
    sampling = Sampling(batch_size=batch_size, images_per_patient=images_per_patient, views=views)
    result = FittedHeads.empty(
        fits, epochs=epochs, patients=len(features.labels), channels=features.channels
    )
    trainers = [_make_trainer(features, fits, group, sampling, tta=tta) for group in _group(fits)]
    for epoch in range(epochs):
        for trainer in trainers:
            trainer.run_epoch(epoch, result)
        progress((epoch + 1) * len(fits), epochs * len(fits), f"epoch {epoch + 1} of {epochs}")
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
    if AGGREGATORS[head.agg].family == "network":
        return HeadSettings(agg="attention")
    if AGGREGATORS[head.agg].family == "ranking":
        return replace(learning(head), lr=1.0, weight_decay=0.0, class_weights="none")
    return HeadSettings(agg="mean", unit=unit_of(head))


def _make_trainer(
    features: Features, fits: Sequence[Fit], positions: list[int], sampling: Sampling, *, tta: bool
) -> Trainer:
    trainer = TRAINERS[AGGREGATORS[fits[positions[0]].head.agg].family]
    return trainer(features, fits, positions, sampling, tta=tta)
