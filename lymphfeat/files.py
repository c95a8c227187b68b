"""Files and folders that are there whole or not at all."""

from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it: it is there whole or not at all.

    Who may read it is as the umask says, even if `write` makes it private, as safetensors does.
    """
    unfinished = path.with_name(path.name + ".partial")
    unfinished.unlink(missing_ok=True)
    unfinished.touch()
    mode = unfinished.stat().st_mode
    write(unfinished)
    unfinished.chmod(mode)
    unfinished.replace(path)
