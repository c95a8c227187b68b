"""A submission file: hard decisions for the unlabelled patients (METHOD §6)."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lymphfeat.errors import SettingsError

PATIENTS_FILE, IMAGES_FILE = "predictions.csv", "images.csv"
SUBMISSION_FILE = "submission.csv"
HEADERS = ("Id,Predicted", "ID,LABEL")


def write_submission(
    patients: pd.DataFrame, ids: Sequence[str], path: Path, header: str = HEADERS[0]
) -> None:
    """Write one row per id, in the order of `ids`: id and 0 or 1.

    `patients` is `Predictions.patients`; `header` one of `HEADERS`.
    """
    if header not in HEADERS:
        raise SettingsError(f"submission header (={header}) must be one of {'; '.join(HEADERS)}.")
    predicted = patients.set_index("id")["predicted"]
    lines = [header, *(f"{id},{int(predicted[id])}" for id in ids)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
