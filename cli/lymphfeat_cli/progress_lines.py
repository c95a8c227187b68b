"""Progress on stderr: a bar on a terminal, one line now and then in a log."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import click

from lymphfeat.runtime.progress import Progress

FIRST_SECONDS = 5.0  # until the first line
EVERY_SECONDS = 30.0  # between lines


class Display(Progress, Protocol):
    """Shows progress, and lines that stay."""

    def say(self, text: str) -> None:
        """Write a line that stays."""


class Nothing:
    """Shows nothing."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        pass

    def say(self, text: str) -> None:
        pass


class ProgressLine:
    """What a long job has done so far, in one line."""

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._clock = title, clock
        self._done, self._total, self._text = 0, 0, ""
        self._first, self._begin = 0, clock()
        self._announced = False

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Note that `done` of `total` units are finished."""
        if total != self._total or done < self._done:  # other work: its pace is its own
            self._first, self._begin, self._announced = done, self._clock(), False
        self._done, self._total, self._text = done, total, text
        if not self._announced and self._is_long():
            self._announced = True
            self.say(str(self))

    def say(self, text: str) -> None:
        """Write a line at once."""
        with suppress(OSError):  # nobody reads stderr any more: the work goes on
            click.echo(text, err=True)

    def __str__(self) -> str:
        """Return e.g. `extracting: 120 of 1345 (9 %), 84 images/s, about 15 s left`."""
        if not self._total:
            return f"{self._title}: started"
        share = 100 * self._done // self._total
        parts = (f"{self._done} of {self._total} ({share} %)", self._text.strip(), self._left())
        return f"{self._title}: {', '.join(part for part in parts if part)}"

    def _is_long(self) -> bool:
        """Return whether the pace is known and the work will take long enough to say so at once."""
        seconds = self._seconds_left()
        paced = self._clock() - self._begin >= FIRST_SECONDS
        return paced and seconds is not None and seconds >= EVERY_SECONDS

    def _left(self) -> str:
        seconds = self._seconds_left()
        return "" if seconds is None else f"about {_duration(seconds)} left"

    def _seconds_left(self) -> float | None:
        finished, waiting = self._done - self._first, self._total - self._done
        if finished <= 0 or waiting <= 0:
            return None
        return waiting * (self._clock() - self._begin) / finished


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def progress_lines(title: str) -> Iterator[ProgressLine]:
    """Write a line on stderr after a few seconds, then one about every half minute.

    A thread writes them: work that reports rarely still shows that it goes on. How long work will
    take is said as soon as that can be estimated, unless it is soon done.
    """
    line, ended = ProgressLine(title), threading.Event()

    def write() -> None:
        seconds = FIRST_SECONDS
        while not ended.wait(seconds):
            line.say(str(line))
            seconds = EVERY_SECONDS

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        ended.set()
        thread.join()
