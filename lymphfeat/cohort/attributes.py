"""Clinical attributes as numbers: age, gender, lymphocyte count, or any other columns."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.errors import SettingsError
from lymphfeat.runtime.arrays import Floats

LOGARITHMIC = ("lymph_count",)  # spans 2 to 300 (METHOD §5)
_NOT_ATTRIBUTES = ("label", "split")


def choose_attributes(table: pd.DataFrame, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the attribute columns: `names`, or all columns of the table but label and split.

    Raises SettingsError for a missing column.
    """
    there = [name for name in table.columns if name not in _NOT_ATTRIBUTES]
    missing = [name for name in names if name not in there]
    if missing:
        raise SettingsError(
            f"attributes (={', '.join(missing)}) must be columns of the cohort's table: "
            f"{', '.join(there) or 'it has none'}."
        )
    return tuple(names) or tuple(there)


def attribute_matrix(
    table: pd.DataFrame, names: Sequence[str], logarithmic: Sequence[str] = LOGARITHMIC
) -> Floats:
    """Return attributes as numbers, (P, D): NaN where missing, one 0/1 column per category.

    The columns `logarithmic`, which must be above 0, are replaced by their logarithm.
    """
    parts = [_columns(table[name], name in logarithmic) for name in names]
    return np.concatenate(parts, axis=1) if parts else np.empty((len(table), 0))


def _columns(column: "pd.Series[float]", logarithmic: bool) -> Floats:
    if not pd.api.types.is_numeric_dtype(column):
        text = column.astype(object)
        values = sorted({str(value) for value in text.dropna()})
        coded = np.array([(text == value).to_numpy(float) for value in values]).T
        coded = coded.reshape(len(text), len(values))
        coded[text.isna().to_numpy()] = np.nan
        return coded
    numbers = column.to_numpy(float)
    if logarithmic:
        if (numbers <= 0).any():
            raise SettingsError(
                f"attribute {column.name} must be above 0 for its logarithm; got "
                f"{np.nanmin(numbers):g} for {column.index[int(np.nanargmin(numbers))]}."
            )
        numbers = np.log(numbers)
    return np.asarray(numbers[:, None], dtype=np.float64)


def standardise(matrix: Floats, rows: NDArray[np.int64]) -> Floats:
    """Scale columns (P, D) to mean 0, deviation 1 over `rows` only; missing values become 0.

    A missing value thus becomes the training patients' mean. A column that is constant over
    `rows` becomes 0.
    """
    given = ~np.isnan(matrix[rows])
    count = np.maximum(given.sum(0), 1)
    filled = np.where(given, matrix[rows], 0)
    mean = filled.sum(0) / count
    deviation = np.sqrt((np.where(given, matrix[rows] - mean, 0) ** 2).sum(0) / count)
    varies = deviation > 1e-9
    scaled = (matrix - mean) / np.where(varies, deviation, 1)
    return np.asarray(np.where(np.isnan(scaled) | ~varies, 0.0, scaled))
