"""Learning curves of a training through the backbone: one row per epoch, as CSV."""

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lymphfeat.evaluation.metrics import all_metrics
from lymphfeat.runtime.files import replace_file

EpochRow = Mapping[str, float]
CURVES = ("curves.csv", "curves.png")
SHOWN_METRICS = ("ba", "auc", "log_loss")


def metric_columns(
    prefix: str, probability: NDArray[np.float32], labels: NDArray[np.int64], threshold: float
) -> dict[str, float]:
    """Return the metrics of patients as columns `<prefix>_<metric>`."""
    metrics = all_metrics(probability.astype(np.float64), labels, threshold)
    return {f"{prefix}_{name}": float(metrics[name]) for name in SHOWN_METRICS}


def unmeasured(prefix: str) -> dict[str, float]:
    """Return the columns of `metric_columns` for an epoch that was not measured: NaN."""
    return {f"{prefix}_{name}": math.nan for name in SHOWN_METRICS}


def write_curves(rows: Sequence[EpochRow], folder: Path) -> None:
    """Write curves.csv to a folder, creating the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CURVES[0], partial(write_csv, rows, list(rows[0])))


def mean_curves(curves: Sequence[Sequence[EpochRow]]) -> list[EpochRow]:
    """Return the mean of several trainings' curves, epoch by epoch.

    One that an earlier version began may have more columns.
    """
    return [
        {
            name: float(np.mean([row[name] for row in rows]))
            for name in rows[0]
            if all(name in row for row in rows)
        }
        for rows in zip(*curves, strict=True)
    ]


def write_csv(rows: Sequence[EpochRow], columns: Sequence[str], path: Path) -> None:
    """Write some columns as CSV, empty where a row has none or NaN."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
