"""The one-way channel by which long library work tells whoever watches how far it is.

The library never prints: a function that takes long accepts a `Progress` and calls it; the command
line draws it (`lymphfeat_cli.options`), a notebook may pass any callable of its own.
"""

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Report that `done` of `total` units are finished; `text` adds live figures."""


def silent(done: int, total: int, text: str = "") -> None:
    """Ignore progress: the default everywhere."""
