"""The head engine: fits many heads together on cached feature maps.

A *fit* is one head's settings on one split. Fits of one family, unit and way of learning are
stacked along one head axis H (`ranking`, `weighted`). Every fit draws its own initialisation and
order from a generator seeded only by its split, so fitting many together gives the same as fitting
one alone. Stacks are fitted one after another, the fastest family first, and a stack that is large
in pieces: what is finished can be shown, and kept in case the rest is interrupted. A piece shares
no reads with another one; each reads the features in its own order. On a CPU the splits of a piece
are shared out over the threads: the many small operations of a step keep one core busy, not all.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import torch

from lymphfeat.heads.engine.exact import ExactHeadTrainer
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.kept import KeptFits
from lymphfeat.heads.engine.networks import NetworkHeadTrainer
from lymphfeat.heads.engine.ranking import RankingHeadTrainer
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.engine.sharing import exchange, own_share
from lymphfeat.heads.engine.trainer import HeadTrainer
from lymphfeat.heads.engine.weighted import WeightedHeadTrainer
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.registry import find_aggregator
from lymphfeat.runtime.devices import available_memory, cpu_threads
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import HeadSettings

TRAINERS: dict[str, type[HeadTrainer]] = {  # in the order of fitting
    "distribution": ExactHeadTrainer,
    "ranking": RankingHeadTrainer,
    "weighted": WeightedHeadTrainer,
    "network": NetworkHeadTrainer,
}
_MOST_THREADS = 8  # that fit side by side: with more, too few splits share what is read
# (positions, results, seconds): some of the fits are finished; None seconds: they were kept.
Finished = Callable[[Sequence[int], FittedHeads, float | None], None]


def _unwatched(positions: Sequence[int], results: FittedHeads, seconds: float | None) -> None:
    """Ignore that fits are finished."""


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
    kept: KeptFits | None = None,
    finished: Finished = _unwatched,
    progress: Progress = silent,
) -> FittedHeads:
    """Fit all heads together; keep every patient's probability after every epoch.

    Evaluation uses the identity view, or with `tta` the mean over the views of `sampling`. Heads
    that need more than `memory` bytes (None: a quarter of the free memory) are fitted piece after
    piece. Pieces that were `kept` are not fitted again; those that are fitted are kept. Under
    torchrun every process fits its share and returns all. With bfloat16 features the last
    probabilities are compared with the same weights' in float32. Progress counts heads × epochs,
    heads without epochs once.
    """
    share = own_share(fits)
    own = FittedHeads.empty(
        [fits[position] for position in share],
        epochs=epochs,
        patients=len(features.labels),
        channels=features.channels,
    )
    memory = available_memory(features.device) // 4 if memory is None else memory
    pieces = _pieces(own.fits, features.channels, sampling, memory)
    count = _Count(progress, sum(piece.work(epochs) for piece in pieces))
    for piece in _not_kept(pieces, features, own, kept, count, finished):
        begin = time.perf_counter()
        _fit_piece(features, own, piece, sampling, tta=tta, count=count)
        if kept is not None:
            kept.write(own.take(piece.positions), features)
        finished(piece.positions, own, time.perf_counter() - begin)
    return exchange(fits, share, own)


@dataclass(frozen=True)
class _Piece:
    """Fits that one trainer fits together."""

    trainer: type[HeadTrainer]
    positions: Sequence[int]
    name: str

    def work(self, epochs: int) -> int:
        """Return what the piece counts as progress."""
        return len(self.positions) * self.trainer.work_of(epochs)


class _Interrupted(Exception):
    """Ends the threads that fit beside one that failed or was interrupted."""


class _Count:
    """Adds up progress of several threads."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock, self._ended = Lock(), False

    def add(self, done: int, *texts: str) -> None:
        """Report that as many more are done; raises in the threads that are to end."""
        with self._lock:
            if self._ended:
                raise _Interrupted
            self._done += done
            self._progress(self._done, self._total, ", ".join(text for text in texts if text))

    def end(self) -> None:
        """End the threads that still fit."""
        self._ended = True


def _not_kept(
    pieces: Sequence[_Piece],
    features: Features,
    result: FittedHeads,
    kept: KeptFits | None,
    count: _Count,
    finished: Finished,
) -> list[_Piece]:
    """Take the pieces that were kept into a result; return the others."""
    waiting = []
    for piece in pieces:
        if kept is None or not kept.read(result, piece.positions, features):
            waiting.append(piece)
            continue
        count.add(piece.work(result.losses.shape[1]), piece.name)
        finished(piece.positions, result, None)
    return waiting


def _fit_piece(
    features: Features,
    result: FittedHeads,
    piece: _Piece,
    sampling: Sampling,
    *,
    tta: bool,
    count: _Count,
) -> None:
    """Fit a piece of a result, and write its results into it."""
    parts = _parts(result.fits, piece, features.device)
    trainers = [
        piece.trainer(features, {each: result.fits[each] for each in part}, sampling, tta=tta)
        for part in parts
    ]
    count.add(0, piece.name)

    def fit(trainer: HeadTrainer) -> None:
        trainer.fit(result, lambda fits, text: count.add(fits, piece.name, text))

    _side_by_side(fit, trainers, count)
    for part, trainer in zip(parts, trainers, strict=True):
        if features.dtype != torch.float32:
            _compare_with_float32(features, result, part, trainer)
        trainer.keep(result)


def _parts(fits: Sequence[Fit], piece: _Piece, device: torch.device) -> list[list[int]]:
    """Share a piece's positions out over threads; those of a split, which share reads, together."""
    splits = list(dict.fromkeys(fits[position].split.id for position in piece.positions))
    n = min(torch.get_num_threads(), len(splits), _MOST_THREADS)
    if device.type != "cpu" or piece.trainer.threaded:
        n = 1
    place = {split: number * n // len(splits) for number, split in enumerate(splits)}
    parts: list[list[int]] = [[] for _ in range(n)]
    for position in piece.positions:
        parts[place[fits[position].split.id]].append(position)
    return parts


def _side_by_side(
    fit: Callable[[HeadTrainer], None], trainers: Sequence[HeadTrainer], count: _Count
) -> None:
    """Fit with each trainer in a thread of its own; what one raises ends the others."""
    if len(trainers) == 1:
        fit(trainers[0])
        return

    def fit_or_end(trainer: HeadTrainer) -> None:
        try:
            fit(trainer)
        except BaseException:
            count.end()
            raise

    each = torch.get_num_threads() // len(trainers)
    begin = partial(torch.set_num_threads, each)
    with cpu_threads(each), ThreadPoolExecutor(len(trainers), "fit", begin) as pool:
        futures = [pool.submit(fit_or_end, trainer) for trainer in trainers]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C
            count.end()
            raise
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, _Interrupted)):
        raise error


def _compare_with_float32(
    features: Features, result: FittedHeads, positions: Sequence[int], trainer: HeadTrainer
) -> None:
    exact = FittedHeads.empty(
        result.fits, epochs=1, patients=len(features.labels), channels=features.channels
    )
    trainer.evaluate_on(features.once("float32", features.in_float32), exact)
    own = list(positions)
    difference = np.abs(exact.curves[own, 0] - result.curves[own, -1])  # (fits, P)
    result.rounding[own] = difference.max(1)


def _pieces(fits: Sequence[Fit], channels: int, sampling: Sampling, memory: int) -> list[_Piece]:
    """Group fits that one trainer can fit together, in the order in which they are fitted."""
    stacks: dict[tuple[type[HeadTrainer], Hashable], list[int]] = defaultdict(list)
    for position, fit in enumerate(fits):
        trainer = _trainer_of(fit.head)
        stacks[trainer, trainer.stack_key(fit.head, sampling)].append(position)
    order = list(TRAINERS.values())
    found = []
    for (trainer, _), stack in sorted(stacks.items(), key=lambda each: order.index(each[0][0])):
        sizes = {
            position: trainer.bytes_of(fits[position].head, channels, sampling.batch_size)
            for position in _by_learner(fits, stack, trainer)
        }
        for piece in _cut(sizes, memory, trainer.most):
            found.append(_Piece(trainer, piece, _name([fits[each].head for each in piece])))
    return found


def _by_learner(fits: Sequence[Fit], stack: Sequence[int], trainer: type[HeadTrainer]) -> list[int]:
    """Order a stack head after head, and heads that learn the same split after split."""
    learners = {trainer.learner_of(fits[position].head): None for position in stack}
    place = {learner: number for number, learner in enumerate(learners)}

    def key(position: int) -> tuple[int, str]:
        fit = fits[position]
        return place[trainer.learner_of(fit.head)], fit.split.id

    return sorted(stack, key=key)


def _cut(sizes: Mapping[int, int], memory: int, most: int) -> Iterator[list[int]]:
    """Cut fits, by their bytes, into pieces whose weights, optimisers and batches fit in memory."""
    piece: list[int] = []
    held = 0
    for position, size in sizes.items():
        if piece and (held + size > memory or len(piece) == most):
            yield piece
            piece, held = [], 0
        piece.append(position)
        held += size
    yield piece


def _name(heads: Sequence[HeadSettings]) -> str:
    """Name a piece by its heads."""
    first, *others = dict.fromkeys(map(head_name, heads))
    return f"{first} and {len(others)} more" if others else first
