"""Truth that is hidden from training: witness images, and the labels of unlabelled patients.

Read from the `truth.csv` of a synthetic cohort (SPLIT, ID, FILE, LABEL, CELL_CLASS, IS_WITNESS),
from any CSV with at least ID, FILE, IS_WITNESS, or from any CSV with ID, LABEL. For scoring, never
for training.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lymphfeat.cohort.csv_rows import complain, read_records
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

        Raises CohortError for a file that has neither, is unreadable, or contradicts itself.
        """
        tables = {path: _read_csv(path) for path in paths}
        images = [read_truth(path) for path, table in tables.items() if _has_instances(table)]
        labels = [read_labels(path) for path, table in tables.items() if _has_labels(table)]
        for path, table in tables.items():
            if not _has_instances(table) and not _has_labels(table):
                raise _missing_columns(path, table, _INSTANCE_COLUMNS)
        return cls(
            images=pd.concat(images, ignore_index=True) if images else None,
            labels=pd.concat(labels).groupby(level=0).first() if labels else None,
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


def read_truth(path: Path) -> pd.DataFrame:
    """Read which images are witnesses: one row per image, columns patient, image, witness (bool).

    Raises CohortError for a file without them, and for an image that occurs twice.
    """
    table = _read_csv(path)
    if not _has_instances(table):
        raise _missing_columns(path, table, _INSTANCE_COLUMNS)
    _check_binary(path, table["IS_WITNESS"])
    frame = pd.DataFrame(
        {"patient": table["ID"], "image": table["FILE"], "witness": table["IS_WITNESS"] == "1"}
    )
    twice = frame.duplicated(["patient", "image"])
    if twice.any():
        first = int(np.flatnonzero(twice)[0])
        patient, image = frame["patient"].iloc[first], frame["image"].iloc[first]
        raise CohortError(
            f"{path} row {frame.index[first]}: image {image} of {patient} must occur once; remove "
            "the repeated row."
        )
    return frame


def read_labels(path: Path) -> pd.Series:
    """Read patients' labels, id -> 0 or 1, from any CSV with columns ID and LABEL; -1 is no label.

    Rows may be patients or images. Raises CohortError unless all rows of a patient agree.
    """
    table = _read_csv(path)
    if not _has_labels(table):
        raise _missing_columns(path, table, _LABEL_COLUMNS)
    table = table[table["LABEL"] != "-1"]
    _check_binary(path, table["LABEL"])
    labels = table.drop_duplicates(["ID", "LABEL"]).set_index("ID")["LABEL"].astype(np.int64)
    if labels.index.has_duplicates:
        twice = ", ".join(labels.index[labels.index.duplicated()].unique()[:5])
        raise CohortError(f"{path}: LABEL must be the same in all rows of {twice}.")
    return labels


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
    """Read a CSV file as a cohort's table is: cells are text, the index is the row's number."""
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
    rows = [[_plain(cell) for cell in cells] for _, cells in records[1:]]
    numbers = [number for number, _ in records[1:]]
    return pd.DataFrame(rows, columns=header, index=numbers, dtype=str)


def _plain(cell: str) -> str:
    return unicodedata.normalize("NFC", cell.strip())  # as ids of cohorts are


def _has_instances(table: pd.DataFrame) -> bool:
    return set(_INSTANCE_COLUMNS) <= set(table.columns)


def _has_labels(table: pd.DataFrame) -> bool:
    return set(_LABEL_COLUMNS) <= set(table.columns)


def _missing_columns(path: Path, table: pd.DataFrame, wanted: Sequence[str]) -> CohortError:
    return CohortError(
        f"{path}: columns must hold {', '.join(wanted)}; got {', '.join(table.columns) or 'none'}."
    )


def _check_binary(path: Path, column: pd.Series) -> None:
    wrong = np.flatnonzero(~column.isin(["0", "1"]))
    if len(wrong):
        row = column.index[wrong[0]]
        raise CohortError(
            f"{path} row {row}, column {column.name}: must be 0 or 1; got {column[row]!r}."
        )
