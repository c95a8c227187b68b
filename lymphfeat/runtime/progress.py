"""Progress reports from long-running library functions.

The library never prints: long-running functions accept a `Progress` and call it; the command line
draws it (`lymphfeat_cli.options`), a notebook may pass any callable.
"""

import time
from typing import Protocol


class Progress(Protocol):
    """A callable that is called as work progresses."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Report that `done` of `total` units are finished; `text` adds live values."""


def silent(done: int, total: int, text: str = "") -> None:
    """Ignore progress: the default everywhere."""


def part_of(progress: Progress, number: int, count: int, name: str) -> Progress:
    """Report the work on part `number` of `count` as a part of the whole, under a name."""

    def report(done: int, total: int, text: str = "") -> None:
        progress(number * total + done, count * total, f"{name} {text}".strip())

    return report


class RateMeter:
    """Adds images per second to progress."""

    def __init__(self, progress: Progress, total: int, *, done: int = 0) -> None:
        """Start with `done` of `total` images finished earlier; they do not count in the rate."""
        self._progress, self._total = progress, total
        self._first, self._done, self._start = done, done, time.perf_counter()
        progress(done, total)

    def add(self, n: int) -> None:
        """Report that `n` more images are done."""
        self._done += n
        rate = (self._done - self._first) / (time.perf_counter() - self._start)
        self._progress(self._done, self._total, f"{rate:.0f} images/s")
