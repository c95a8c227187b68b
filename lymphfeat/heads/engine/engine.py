"""The head engine: fits many heads together on cached feature maps.

A *fit* is one head's settings on one split. Fits of one family, unit and way of learning are
stacked along one head axis H (`ranking`, `weighted`); `networks` share what they read. Every fit
draws its own initialisation and order from a generator seeded only by its split, so fitting many
together gives the same as fitting one alone, and a grid can be cut into blocks that fit in memory.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from lymphfeat.heads.engine.exact import ExactHeadTrainer
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.networks import NetworkHeadTrainer
from lymphfeat.heads.engine.ranking import RankingHeadTrainer
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.engine.sharing import by_split, exchange, own_share
from lymphfeat.heads.engine.trainer import HeadTrainer
from lymphfeat.heads.engine.weighted import WeightedHeadTrainer
from lymphfeat.heads.registry import find_aggregator
from lymphfeat.runtime.devices import available_memory
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import HeadSettings

TRAINERS: dict[str, type[HeadTrainer]] = {
    "ranking": RankingHeadTrainer,
    "weighted": WeightedHeadTrainer,
    "network": NetworkHeadTrainer,
    "distribution": ExactHeadTrainer,
}


def _trainer_of(head: HeadSettings) -> type[HeadTrainer]:
    return TRAINERS[find_aggregator(head).family]


def fit_stacked(
    features: Features,
    fits: Sequence[Fit],
    *,
    epochs: int,
    sampling: Sampling,
    tta: bool = False,
    memory: int | None = None,
    progress: Progress = silent,
) -> FittedHeads:
    """Fit all heads together; keep every patient's probability after every epoch.

    Evaluation uses the identity view, or with `tta` the mean over the views of `sampling`. Heads
    that need more than `memory` bytes (None: a quarter of the free memory) are fitted block after
    block. Under torchrun every process fits its share and returns all. With bfloat16 features the
    last probabilities are compared with the same weights' in float32. Progress counts heads ×
    epochs.
    """
    share = own_share(fits)
    own = FittedHeads.empty(
        [fits[position] for position in share],
        epochs=epochs,
        patients=len(features.labels),
        channels=features.channels,
    )
    memory = available_memory(features.device) // 4 if memory is None else memory
    blocks = _blocks(own.fits, features.channels, sampling.batch_size, memory)
    count = _Count(progress, len(own.fits) * epochs, epochs, len(blocks))
    for number, block in enumerate(blocks):
        _fit_block(features, own, block, sampling, tta=tta, count=partial(count, number))
    return exchange(fits, share, own)


class _Count:
    """Turns heads × epochs into progress."""

    def __init__(self, progress: Progress, total: int, epochs: int, blocks: int) -> None:
        self._progress, self._total, self._epochs, self._blocks = progress, total, epochs, blocks
        self._done = 0

    def __call__(self, block: int, heads: int, epoch: int) -> None:
        """Report that some heads of a block have finished an epoch."""
        self._done += heads
        of_block = f", block {block + 1} of {self._blocks}" if self._blocks > 1 else ""
        text = f"epoch {epoch + 1} of {self._epochs}{of_block}"
        self._progress(self._done, self._total, text)


def _fit_block(
    features: Features,
    result: FittedHeads,
    positions: Sequence[int],
    sampling: Sampling,
    *,
    tta: bool,
    count: Callable[[int, int], None],
) -> None:
    """Fit some of the fits of a result together, and write their results into it."""
    own = {position: result.fits[position] for position in positions}
    trainers = [
        trainer(features, stack, sampling, tta=tta) for trainer, stack in _stacks(own, sampling)
    ]
    for epoch in range(result.losses.shape[1]):
        for trainer in trainers:
            trainer.run_epoch(epoch, result)
            count(len(trainer), epoch)
    if features.dtype != torch.float32:
        _compare_with_float32(features, result, positions, trainers)
    for trainer in trainers:
        trainer.keep(result)


def _compare_with_float32(
    features: Features,
    result: FittedHeads,
    positions: Sequence[int],
    trainers: Sequence[HeadTrainer],
) -> None:
    exact = FittedHeads.empty(
        result.fits, epochs=1, patients=len(features.labels), channels=features.channels
    )
    in_float32 = features.in_float32()
    for trainer in trainers:
        trainer.evaluate_on(in_float32, exact)
    own = list(positions)
    difference = np.abs(exact.curves[own, 0] - result.curves[own, -1])  # (fits, P)
    result.rounding[own] = difference.max(1)


def _blocks(fits: Sequence[Fit], channels: int, batch_size: int, memory: int) -> list[list[int]]:
    """Cut fits into blocks whose weights, optimisers and batches fit in memory."""
    sizes: dict[HeadSettings, int] = {}
    blocks: list[list[int]] = [[]]
    held = 0
    for position in by_split(fits):
        fit = fits[position]
        if fit.head not in sizes:
            sizes[fit.head] = _trainer_of(fit.head).bytes_of(fit.head, channels, batch_size)
        if blocks[-1] and held + sizes[fit.head] > memory:
            blocks.append([])
            held = 0
        blocks[-1].append(position)
        held += sizes[fit.head]
    return blocks


def _stacks(
    fits: Mapping[int, Fit], sampling: Sampling
) -> list[tuple[type[HeadTrainer], dict[int, Fit]]]:
    """Group fits that one trainer can train together."""
    stacks: dict[tuple[type[HeadTrainer], Hashable], dict[int, Fit]] = defaultdict(dict)
    for position, fit in fits.items():
        trainer = _trainer_of(fit.head)
        stacks[trainer, trainer.stack_key(fit.head, sampling)][position] = fit
    return [(trainer, stack) for (trainer, _), stack in stacks.items()]
