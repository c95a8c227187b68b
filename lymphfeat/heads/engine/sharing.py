"""The head axis divided among the processes that torchrun started."""

from collections.abc import Sequence

from torch import distributed

from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.runtime.processes import count, rank


def own_share(fits: Sequence[Fit]) -> list[int]:
    """Return the positions of this process's fits; those of a split stay together."""
    if count() == 1:
        return list(range(len(fits)))
    order, n = by_split(fits), count()
    return order[len(order) * rank() // n : len(order) * (rank() + 1) // n]


def exchange(fits: Sequence[Fit], positions: Sequence[int], part: FittedHeads) -> FittedHeads:
    """Return all fits, collected from what every process fitted at its positions."""
    if count() == 1:
        return part
    own = (list(positions), part)
    everything: list[tuple[list[int], FittedHeads] | None] = [None] * count()
    distributed.all_gather_object(everything, own)
    _, epochs, patients = part.curves.shape
    channels = part.weight.shape[1]
    whole = FittedHeads.empty(fits, epochs=epochs, patients=patients, channels=channels)
    for theirs in everything:
        assert theirs is not None
        whole.put(*theirs)
    return whole


def by_split(fits: Sequence[Fit]) -> list[int]:
    """Order the positions of fits so that those of a split, which share reads, are adjacent."""
    return sorted(range(len(fits)), key=lambda position: fits[position].split.id)
