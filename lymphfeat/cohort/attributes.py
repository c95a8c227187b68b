"""Clinical attributes as numbers: age, gender, lymphocyte count, or any other columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lymphfeat.errors import SettingsError
from lymphfeat.runtime.arrays import Floats

LOGARITHMIC = ("lymph_count",)  # spans 2 to 300 (METHOD §5)
_NOT_ATTRIBUTES = ("label", "split")
_LEAST_DEVIATION = 1e-9  # a column that varies less is constant


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


@dataclass(frozen=True)
class Scaling:
    """Scales columns to mean 0 and deviation 1 over the patients it was learnt from.

    A missing value becomes 0, the mean of those patients; so does a column that is constant there.
    """

    mean: Floats  # (D,)
    scale: Floats  # (D,) 1 / standard deviation; 0 of constant columns

    @classmethod
    def of(cls, matrix: Floats) -> "Scaling":
        """Learn from patients (n, D), NaN where missing."""
        given = ~np.isnan(matrix)
        count = np.maximum(given.sum(0), 1)
        mean = np.where(given, matrix, 0).sum(0) / count
        deviation = np.sqrt((np.where(given, matrix - mean, 0) ** 2).sum(0) / count)
        varies = deviation > _LEAST_DEVIATION
        return cls(mean, np.where(varies, 1 / np.where(varies, deviation, 1), 0))

    def apply(self, matrix: Floats) -> Floats:
        """Scale patients (m, D), NaN where missing."""
        scaled = (matrix - self.mean) * self.scale
        return np.asarray(np.where(np.isnan(scaled), 0.0, scaled))
