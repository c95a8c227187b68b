"""Learning curves: one row an epoch, as CSV and as a figure."""

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lymphfeat.axes import show_all_shares
from lymphfeat.files import replace_file
from lymphfeat.metrics import all_metrics

Row = Mapping[str, float]
CURVES = ("curves.csv", "curves.png")
SHOWN_METRICS = ("ba", "auc", "log_loss")


def metric_columns(
    prefix: str, probability: NDArray[np.float32], labels: NDArray[np.int64], threshold: float
) -> dict[str, float]:
    """Return the metrics of patients as columns `<prefix>_<metric>`."""
    metrics = all_metrics(probability.astype(np.float64), labels, threshold)
    return {f"{prefix}_{name}": float(metrics[name]) for name in SHOWN_METRICS}


def write_curves(rows: Sequence[Row], folder: Path) -> None:
    """Write curves.csv to a folder, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CURVES[0], partial(_write, rows))


def draw_curves(rows: Sequence[Row], folder: Path) -> None:
    """Write curves.png to a folder."""
    replace_file(folder / CURVES[1], partial(_draw, rows))


def _write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw losses, and balanced accuracies, over epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_lines(left, rows, {"loss": "training", "validation_log_loss": "validation"}, "loss")
    named = {"train_ba": "training", "validation_ba": "validation"}
    _draw_lines(right, rows, named, "balanced accuracy")
    show_all_shares(right, "y")
    figure.savefig(path, format="png", dpi=120)


def _draw_lines(axes: Axes, rows: Sequence[Row], columns: Mapping[str, str], title: str) -> None:
    epochs = [row["epoch"] for row in rows]
    for column, name in columns.items():
        if column in rows[0]:
            axes.plot(epochs, [row[column] for row in rows], marker=".", label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
