"""The curve of a pre-training: one row an epoch, as CSV and as a figure."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lymphfeat.axes import show_all_shares

Row = Mapping[str, float]
COLUMNS = ("epoch", "loss", "class_loss", "class_accuracy", "probe")
_PROBED = {
    "patients": "nearest cell is of the same patient",
    "classes": "nearest cell is of the same class",
    "none": "",  # one group: nothing to tell apart
}


def write_curve(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as CSV; epoch 0, before training, has no losses."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)


def draw_curve(rows: Sequence[Row], path: Path, grouping: str) -> None:
    """Draw the loss and the nearest-neighbour probe over epochs as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = rows[1:]
    left.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], marker=".")
    left.set_ylabel("loss")
    right.plot([row["epoch"] for row in rows], [row["probe"] for row in rows], marker=".")
    right.set_ylabel(_PROBED[grouping])
    show_all_shares(right, "y")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
