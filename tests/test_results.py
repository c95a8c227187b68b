"""The results of fits: some of them, and curves that memory has no room for."""

import errno
import os

import numpy as np
import pytest

from lymphfeat.cohort.splits import Split
from lymphfeat.errors import OutputError
from lymphfeat.heads.engine import results
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.settings import HeadSettings


def make_fits(n: int) -> list[Fit]:
    splits = [Split(id=f"s{i}", seed=i, repeat=0, train=(), validation=()) for i in range(n)]
    return [Fit(head=HeadSettings(), split=split) for split in splits]


def make_results(n: int) -> FittedHeads:
    made = FittedHeads.empty(make_fits(n), epochs=2, patients=3, channels=4)
    made.curves[:] = np.arange(made.curves.size).reshape(made.curves.shape)
    made.bias[:] = np.arange(n)
    return made


@pytest.mark.parametrize("positions", [[], [3], [0, 1, 2], [2, 3, 4], [4, 2, 3], [0, 2], range(5)])
def test_some_fits_are_those_asked_for(positions: list[int]) -> None:
    whole = make_results(5)
    part = whole.take(positions)
    assert part.fits == tuple(whole.fits[i] for i in positions)
    np.testing.assert_array_equal(part.curves, whole.curves[list(positions)])
    np.testing.assert_array_equal(part.bias, list(positions))


def test_neighbours_are_not_copied() -> None:
    whole = make_results(5)
    assert np.shares_memory(whole.take(range(1, 4)).curves, whole.curves)
    assert not np.shares_memory(whole.take([0, 2]).curves, whole.curves)


def test_large_curves_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_LARGE", 0)
    made = FittedHeads.empty(make_fits(2), epochs=3, patients=4, channels=1)
    assert isinstance(made.curves, np.memmap)
    assert made.curves.shape == (2, 3, 4)
    assert np.isnan(made.curves).all()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the disk's room is asked for")
def test_curves_that_a_full_disk_has_no_room_for_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results, "_LARGE", 0)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    message = (
        r"the learning curves of 2 fits \(0\.0 GB\) fit neither in memory nor in the temporary "
        r"folder \(.*No space left on device\); set TMPDIR to a folder with more room, or fit fewer"
    )
    with pytest.raises(OutputError, match=message):
        FittedHeads.empty(make_fits(2), epochs=3, patients=4, channels=1)
