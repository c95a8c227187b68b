"""Processes that kill themselves at a moment of their own.

Imports little: a test starts a process for every operation on the disk.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def kill_at(
    count: int, counts: Callable[[str, tuple[Any, ...]], bool], number: int = signal.SIGKILL
) -> None:
    """Send this process a signal before the operation that is number `count` of those that count.

    `counts` is asked of every event of Python's audit, with its arguments.
    """
    left = count

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if counts(event, arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    sys.addaudithook(kill)
