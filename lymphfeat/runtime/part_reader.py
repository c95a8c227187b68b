"""Reading a mapped file part by part, without holding what was read."""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HELD = 64 << 20  # bytes of a mapped file that a reader leaves in the process's memory
_AROUND = 1 << 16  # bytes that the system maps at once around a place that is read


class PartReader:
    """Copies parts of an array, which may be mapped from a file larger than the memory.

    The system counts every page that was read as this process's until it needs the memory for
    something else; so the pages are given back now and then. What is read again comes from the
    system's cache of the file.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        """Take the array; one that is in memory, or a private copy of a file, is left alone."""
        self.array = array
        self._held = 0

    def read(self, *place: Any) -> NDArray[Any]:
        """Return a copy of the part at an index of numpy's."""
        rows = len(place[0]) if isinstance(place[0], np.ndarray) else 0
        part = np.asarray(self.array[place]) if rows else np.array(self.array[place])
        self._held += max(part.nbytes, rows * _AROUND)
        if self._held > _HELD:
            _give_back(self.array)
            self._held = 0
        return part


def _give_back(array: NDArray[Any]) -> None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    shared = isinstance(array, np.memmap) and array.mode != "c"
    if shared and isinstance(base, mmap.mmap) and hasattr(base, "madvise"):  # not on Windows
        base.madvise(mmap.MADV_DONTNEED)
