"""Types of arrays: one name for each, everywhere."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Labels = NDArray[np.int64]  # 0 reactive, 1 tumoral; -1 unknown
