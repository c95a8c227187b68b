"""Truth that is hidden from training: witness images, and the labels of unlabelled patients.

Read from the `truth.csv` of a synthetic cohort (SPLIT, ID, FILE, LABEL, CELL_CLASS, IS_WITNESS),
from any CSV with at least ID, FILE, IS_WITNESS, or from any CSV with ID, LABEL. For scoring, never
for training.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lymphfeat.cohort.csv_rows import complain, plain_cell, read_records
from lymphfeat.errors import CohortError
from lymphfeat.evaluation.metrics import all_metrics, roc_auc

_INSTANCE_COLUMNS = ("ID", "FILE", "IS_WITNESS")
_LABEL_COLUMNS = ("ID", "LABEL")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The content of one or several truth files."""

    images: pd.DataFrame | None  # patient, image, witness
    labels: pd.Series | None  # patient -> 0 or 1

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Truth":
        """Read witness images, labels or both from each file.

        Rows may be images or patients; the label -1 is none. Raises CohortError for a file that has
        neither or is unreadable, for an image that occurs twice, and unless all rows of a patient
        agree on its label, in one file or in several.
        """
        tables = {path: _read_csv(path) for path in paths}
        for path, table in tables.items():
            if not _has(table, _INSTANCE_COLUMNS) and not _has(table, _LABEL_COLUMNS):
                raise _missing_columns(path, table)
        images = _rows_with(_INSTANCE_COLUMNS, tables.values())
        labels = _rows_with(_LABEL_COLUMNS, tables.values())
        return cls(
            images=None if images is None else _witnesses(images),
            labels=None if labels is None else _labels(labels),
        )

    def score(
        self, images: pd.DataFrame, patients: pd.DataFrame, threshold: float = 0.5
    ) -> dict[str, float]:
        """Measure how well images are ranked, and patients with hidden labels predicted.

        `images` has the columns patient, image, logit; `patients` has id, label, probability, where
        a missing label is a hidden one. Metrics of hidden labels begin with `hidden_`. Raises
        CohortError if the truth names none of the images.
        """
        scores: dict[str, float] = {}
        if self.images is not None and self.images["witness"].any():
            scores["witness_auc"] = witness_auc(images, self.images)
            scores["witness_auc_all"] = witness_auc_all(images, self.images)
        if self.labels is not None:
            scores |= _hidden_metrics(patients, self.labels, threshold)
        return scores


def _witnesses(table: pd.DataFrame) -> pd.DataFrame:
    """Return which images are witnesses: a row for each, columns patient, image, witness (bool)."""
    _check_binary(table["IS_WITNESS"])
    twice = table[table.duplicated(["ID", "FILE"], keep=False)].sort_values(["ID", "FILE"])
    if len(twice):
        complain(
            "an image must occur once",
            [f"{row} has {file} of {id}" for row, id, file, _ in twice.itertuples()],
            "Keep one row of each.",
        )
    return pd.DataFrame(
        {"patient": table["ID"], "image": table["FILE"], "witness": table["IS_WITNESS"] == "1"}
    ).reset_index(drop=True)


def _labels(table: pd.DataFrame) -> pd.Series:
    """Return the patients' labels, id -> 0 or 1, without those of -1."""
    table = table[table["LABEL"] != "-1"]
    _check_binary(table["LABEL"])
    values = table.drop_duplicates(["ID", "LABEL"])
    twice = values[values.duplicated("ID", keep=False)].sort_values("ID", kind="stable")
    if len(twice):
        complain(
            "LABEL must be the same in all rows of a patient",
            [f"{row} says {label} of {id}" for row, id, label in twice.itertuples()],
            "Correct the wrong ones.",
        )
    return values.set_index("ID")["LABEL"].astype(np.int64)


def witness_auc(images: pd.DataFrame, truth: pd.DataFrame) -> float:
    """Return the ROC-AUC of image logits for witnesses, in patients with at least one witness.

    `images` has the columns patient, image, logit; images that are not in `truth` are left out.
    """
    known = _joined(images, truth)
    return _auc(known[known.groupby("patient")["witness"].transform("any")])


def witness_auc_all(images: pd.DataFrame, truth: pd.DataFrame) -> float:
    """Return the ROC-AUC of image logits for witnesses, over the images of all patients."""
    return _auc(_joined(images, truth))


def _joined(images: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    known = images[["patient", "image", "logit"]].merge(truth, on=["patient", "image"])
    if known.empty:
        raise CohortError(
            "truth must name images of this cohort; got none of them. "
            "Use the truth file of this cohort."
        )
    return known


def _auc(known: pd.DataFrame) -> float:
    logits = known["logit"].to_numpy(np.float64)
    return float(roc_auc(logits, known["witness"].to_numpy().astype(np.int64)))


def _hidden_metrics(
    patients: pd.DataFrame, labels: pd.Series, threshold: float
) -> dict[str, float]:
    hidden = patients[patients["label"].isna() & patients["id"].isin(labels.index)]
    if hidden.empty:
        return {}
    true = labels.loc[hidden["id"]].to_numpy(np.int64)
    metrics = all_metrics(hidden["probability"].to_numpy(np.float64), true, threshold)
    return {
        "hidden_patients": float(len(hidden)),
        **{f"hidden_{name}": float(value) for name, value in metrics.items()},
    }


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file as a cohort's table is: cells are text, the index says where a row is."""
    records, _ = read_records(path)
    header = [name.strip().upper() for name in (records[0][1] if records else ())]
    if twice := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
        complain(f"{path} row 1 names columns twice", twice, "Keep one of each.")
    for number, cells in records[1:]:
        if len(cells) != len(header):
            raise CohortError(
                f"{path} row {number} has {len(cells)} cells, the header {len(header)}; quote "
                "values that contain a comma, and write every cell."
            )
    rows = [[plain_cell(cell) for cell in cells] for _, cells in records[1:]]
    places = [f"{path} row {number}" for number, _ in records[1:]]
    return pd.DataFrame(rows, columns=header, index=places, dtype=str)


def _has(table: pd.DataFrame, columns: Sequence[str]) -> bool:
    return set(columns) <= set(table.columns)


def _rows_with(columns: Sequence[str], tables: Iterable[pd.DataFrame]) -> pd.DataFrame | None:
    """Join some columns of those tables that have them all; None where no table has."""
    found = [table[list(columns)] for table in tables if _has(table, columns)]
    return pd.concat(found) if found else None


def _missing_columns(path: Path, table: pd.DataFrame) -> CohortError:
    return CohortError(
        f"{path}: columns must hold {', '.join(_INSTANCE_COLUMNS)} or {', '.join(_LABEL_COLUMNS)}; "
        f"got {', '.join(table.columns) or 'none'}."
    )


def _check_binary(column: pd.Series) -> None:
    wrong = column[~column.isin(["0", "1"])]
    if len(wrong):
        raise CohortError(
            f"{wrong.index[0]}, column {column.name}: must be 0 or 1; got {wrong.iloc[0]!r}."
        )
