"""The processes that torchrun started: the head axis is shared out over them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import distributed

from lymphfeat.training.fits import Fit, FittedHeads


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes of torchrun for a while; alone, do nothing.

    Results travel between main memories (gloo): with or without GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Return whether this process is the one that writes and shows results."""
    return not _together() or distributed.get_rank() == 0


def own_share(fits: Sequence[Fit]) -> list[int]:
    """Return the positions of the fits that fall to this process; those of a split together."""
    if not _together():
        return list(range(len(fits)))
    order, rank, n = by_split(fits), distributed.get_rank(), distributed.get_world_size()
    return order[len(order) * rank // n : len(order) * (rank + 1) // n]


def exchange(fits: Sequence[Fit], positions: Sequence[int], part: FittedHeads) -> FittedHeads:
    """Return all fits, from what every process has fitted at its positions."""
    if not _together():
        return part
    own = (list(positions), part)
    everything: list[tuple[list[int], FittedHeads] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, own)
    _, epochs, patients = part.curves.shape
    channels = part.weight.shape[1]
    whole = FittedHeads.empty(fits, epochs=epochs, patients=patients, channels=channels)
    for theirs in everything:
        assert theirs is not None
        whole.put(*theirs)
    return whole


def by_split(fits: Sequence[Fit]) -> list[int]:
    """Order the positions of fits so that those of a split, which share what is read, meet."""
    return sorted(range(len(fits)), key=lambda position: fits[position].split.id)
