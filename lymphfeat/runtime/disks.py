"""What a disk refuses, as one line that names the file and says what to do next.

Python raises an OSError; HDF5 and safetensors say in a text of their own which one it was.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lymphfeat.errors import LymphfeatError, OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_ADVICE = {
    **dict.fromkeys(_FULL, "make room, then run the same line again: finished work is kept"),
    **dict.fromkeys(_CLOSED, "choose another --out, or make its folder writable"),
    errno.EIO: "check the disk, then run the same line again: finished work is kept",
}
_NUMBER = re.compile(r"(?:os error |errno = |Errno )(\d+)")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OutputError where a disk refuses `path`, or what is written next to it."""
    try:
        yield
    except LymphfeatError:
        raise
    except Exception as error:  # each library has its own
        refused = disk_error(error, path)
        if refused is None:
            raise
        raise refused from error


def require_room(path: Path, size: int) -> None:
    """Raise OutputError unless the disk of `path`, whose folder exists, has `size` bytes free.

    For HDF5, which may crash on a full disk; and it is better known before the work than after it.
    """
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OutputError(
            f"{path}: cannot be written (No space left on device: it takes {size / 1e6:,.1f} MB, "
            f"of which {free / 1e6:,.1f} are free); {_ADVICE[errno.ENOSPC]}."
        )


def disk_error(error: Exception, path: Path | None = None) -> OutputError | None:
    """Return what a disk refused as one line; None for any other error.

    The file is the one that the error names, else `path`. With a `path`, a file elsewhere that may
    not be opened is another error: it may have been for reading.
    """
    number = _number_of(error)
    named = error.filename if isinstance(error, OSError) else None
    file = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
    if number not in _ADVICE or (number in _CLOSED and path and file and not _near(file, path)):
        return None
    reason = os.strerror(errno.ENOTDIR if number == errno.EEXIST else number)  # of a new folder
    return OutputError(f"{file or 'the output'}: cannot be written ({reason}); {_ADVICE[number]}.")


def _number_of(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else 0


def _near(file: Path, path: Path) -> bool:
    """Return whether a file is `path`, one of a name that begins like it, or a folder above it."""
    file, path = file.absolute(), path.absolute()
    return str(file).startswith(str(path)) or path.is_relative_to(file)
