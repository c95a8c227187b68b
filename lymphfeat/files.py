"""Files and folders that are there whole or not at all."""

from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it: it is there whole or not at all."""
    unfinished = path.with_name(path.name + ".partial")
    write(unfinished)
    unfinished.replace(path)
