"""Arrays that need not fit in memory, mapped from an unnamed file in the temporary folder."""

import errno
import math
import os
import shutil
import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lymphfeat.errors import OutputError


def map_array(shape: tuple[int, ...], dtype: DTypeLike, what: str, remedy: str) -> NDArray[Any]:
    """Return an array of zeros in a file ($TMPDIR) that lives as long as the array.

    Raises OutputError unless the disk has room for all of it: `what` names the content, and
    `remedy` what else the user can do than to find a larger folder.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile() as file:  # the map keeps it open
            _reserve(file.fileno(), size)
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"{what} ({size / 1e9:,.1f} GB) fit neither in memory nor in the temporary folder "
            f"({error}); set TMPDIR to a folder with more room, or {remedy}."
        ) from None


def _reserve(descriptor: int, size: int) -> None:
    """Fail now if a temporary file does not fit on the disk: a write to the map would crash."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    elif shutil.disk_usage(tempfile.gettempdir()).free < size:  # macOS, Windows
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
