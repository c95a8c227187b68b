"""The learning curve of a pre-training: one row per epoch, as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

from lymphfeat.finetuning.curves import EpochRow

COLUMNS = ("epoch", "loss", "class_loss", "class_accuracy", "probe")


def write_curve(rows: Sequence[EpochRow], path: Path) -> None:
    """Write the rows as CSV; epoch 0, before training, has no losses."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
