"""Clinical attributes as numbers: age, gender, lymphocyte count, or any other columns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.runtime.arrays import Floats

LOGARITHMIC = ("lymph_count",)  # spans 2 to 300 (METHOD §5)
_NOT_ATTRIBUTES = ("label", "split")
_LEAST_DEVIATION = 1e-9  # a column that varies less is constant


def choose_attributes(
    table: pd.DataFrame, names: Sequence[str] = (), *, groups: str = ""
) -> tuple[str, ...]:
    """Return the attribute columns: `names`, or all columns of the table but label and split.

    The column `groups` is one only if it is named. Raises SettingsError for a missing column.
    """
    there = [name for name in table.columns if name not in _NOT_ATTRIBUTES]
    missing = [name for name in names if name not in there]
    if missing:
        raise SettingsError(
            f"attributes (={', '.join(missing)}) must be columns of the cohort's table: "
            f"{', '.join(there) or 'it has none'}."
        )
    return tuple(names) or tuple(name for name in there if name != groups)


def attribute_matrix(
    table: pd.DataFrame, names: Sequence[str], logarithmic: Sequence[str] = LOGARITHMIC
) -> Floats:
    """Return attributes as numbers, (P, D): NaN where missing, one 0/1 column per category.

    The columns `logarithmic`, which must be above 0, are replaced by their logarithm.
    """
    return AttributeRecipe.of(table, names, logarithmic).matrix(table)


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One attribute: how it becomes numbers, and what was seen of it in training."""

    name: str
    categories: tuple[str, ...] | None = None  # of a text: a 0/1 column for each; None: a number
    logarithmic: bool = False
    low: float = np.nan  # least and greatest number in training
    high: float = np.nan

    @classmethod
    def of(cls, column: "pd.Series[Any]", *, logarithmic: bool) -> "Attribute":
        """Learn from a column of training patients."""
        name = str(column.name)
        if not pd.api.types.is_numeric_dtype(column):
            return cls(name=name, categories=tuple(sorted(set(map(str, column.dropna())))))
        numbers = column.to_numpy(float)
        known = numbers[~np.isnan(numbers)]
        low, high = (known.min(), known.max()) if len(known) else (np.nan, np.nan)
        return cls(name=name, logarithmic=logarithmic, low=float(low), high=float(high))

    @property
    def width(self) -> int:
        """The number of columns of its matrix."""
        return 1 if self.categories is None else len(self.categories)

    def numbers(self, column: "pd.Series[Any]") -> Floats:
        """Return the attribute of patients as numbers: (P, width), NaN where missing or unknown.

        Raises SettingsError for a number without a logarithm, CohortError for a text that should be
        a number.
        """
        if self.categories is not None:
            text = column.astype(object)
            coded = np.array([text == value for value in self.categories], float)
            coded = coded.reshape(self.width, len(text)).T  # (P, width)
            return np.asarray(np.where(coded.sum(1, keepdims=True) > 0, coded, np.nan))
        self._refuse_text(column)
        numbers = column.to_numpy(float)
        if self.logarithmic:
            if (numbers <= 0).any():
                raise SettingsError(
                    f"attribute {self.name} must be above 0 for its logarithm; got "
                    f"{np.nanmin(numbers):g} for {column.index[int(np.nanargmin(numbers))]}."
                )
            numbers = np.log(numbers)
        return np.asarray(numbers[:, None], dtype=np.float64)

    def _refuse_text(self, column: "pd.Series[Any]") -> None:
        if pd.api.types.is_numeric_dtype(column) or not column.notna().any():
            return
        given = column.dropna()
        bad = given[pd.to_numeric(given, errors="coerce").isna()]
        patient, value = next(iter((bad if len(bad) else given).items()))
        raise CohortError(f"attribute {self.name} must be a number; got {value!r} for {patient}.")

    def notes(self, column: "pd.Series[Any]") -> Iterator[tuple[str, str]]:
        """Yield (patient, what is unusual) for values that training had nothing like."""
        stands_in = "the mean of the training patients stands in"
        for patient, value in column.items():
            if pd.isna(value):
                yield str(patient), f"{self.name} is missing; {stands_in}"
            elif self.categories is not None and str(value) not in self.categories:
                known = ", ".join(self.categories) or "none"
                yield str(patient), f"{self.name} {value} is not one of {known}; {stands_in}"
            elif self.categories is None and np.isnan(self.low):
                yield str(patient), f"{self.name} is not used: no training patient had one"
            elif self.categories is None and not self.low <= float(value) <= self.high:
                side = "below" if float(value) < self.low else "above"
                yield (
                    str(patient),
                    f"{self.name} {value:g} is {side} the training patients' {self.low:g} to "
                    f"{self.high:g}",
                )


@dataclass(frozen=True)
class AttributeRecipe:
    """How the clinical attributes of new patients become the numbers of training."""

    attributes: tuple[Attribute, ...]

    @classmethod
    def of(
        cls, table: pd.DataFrame, names: Sequence[str], logarithmic: Sequence[str] = LOGARITHMIC
    ) -> "AttributeRecipe":
        """Learn from the table of training patients."""
        return cls(
            tuple(Attribute.of(table[name], logarithmic=name in logarithmic) for name in names)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the attributes."""
        return tuple(attribute.name for attribute in self.attributes)

    def matrix(self, table: pd.DataFrame) -> Floats:
        """Return patients' attributes as numbers: (P, D), NaN where missing or unknown.

        Raises CohortError for a missing column.
        """
        self._check_columns(table)
        parts = [attribute.numbers(table[attribute.name]) for attribute in self.attributes]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(table), 0))

    def complete(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the table with a column of missing values for every attribute that it lacks."""
        return table.assign(**{name: np.nan for name in self.names if name not in table.columns})

    def notes(self, table: pd.DataFrame) -> dict[str, list[str]]:
        """Return for each patient what is missing, unknown or outside the range of training."""
        found: dict[str, list[str]] = {}
        for attribute in self.attributes:
            for patient, note in attribute.notes(table[attribute.name]):
                found.setdefault(patient, []).append(note)
        return found

    @property
    def groups(self) -> list[slice]:
        """The columns of the matrix that belong to each attribute."""
        ends = np.cumsum([attribute.width for attribute in self.attributes]).tolist()
        return [
            slice(end - attribute.width, end)
            for attribute, end in zip(self.attributes, ends, strict=True)
        ]

    def _check_columns(self, table: pd.DataFrame) -> None:
        missing = [name for name in self.names if name not in table.columns]
        if missing:
            raise CohortError(
                f"the cohort's table must have the columns {', '.join(self.names)}, which this "
                f"model reads; got none named {', '.join(missing)}. Add them, let the training "
                "patients' mean stand in with --allow-missing-attributes, or predict from the "
                "images only with --without-attributes."
            )

    def to_json(self) -> list[dict[str, Any]]:
        """Return the content for a model file."""
        return [asdict(attribute) for attribute in self.attributes]

    @classmethod
    def from_json(cls, content: Sequence[Mapping[str, Any]]) -> "AttributeRecipe":
        """Read what `to_json` returned."""
        return cls(
            tuple(
                Attribute(
                    name=str(each["name"]),
                    categories=None
                    if each["categories"] is None
                    else tuple(map(str, each["categories"])),
                    logarithmic=bool(each["logarithmic"]),
                    low=_number(each["low"]),
                    high=_number(each["high"]),
                )
                for each in content
            )
        )


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)  # JSON has no NaN


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
