"""Types of arrays: one name for each, everywhere."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Labels = NDArray[np.int64]  # 0 reactive, 1 tumoral; -1 unknown

FLOAT16_MAX = float(np.finfo(np.float16).max)


def beyond_float16(values: NDArray[np.float32]) -> tuple[int, float] | None:
    """Return the first of n rows (n, …) that float16 cannot hold, and its magnitude; else None."""
    largest = np.abs(values).max(axis=tuple(range(1, values.ndim)))  # (n,)
    bad = np.flatnonzero(~(largest <= FLOAT16_MAX))  # catches NaN too
    return (int(bad[0]), float(largest[bad[0]])) if len(bad) else None
