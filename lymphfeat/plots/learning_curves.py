"""The plot of an end-to-end training's learning curves."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lymphfeat.finetuning.curves import CURVES, EpochRow
from lymphfeat.plots.axes import show_all_shares
from lymphfeat.runtime.files import replace_file


def draw_curves(rows: Sequence[EpochRow], folder: Path) -> None:
    """Write curves.png to a folder."""
    replace_file(folder / CURVES[1], partial(_draw, rows))


def _draw(rows: Sequence[EpochRow], path: Path) -> None:
    """Draw losses, and balanced accuracies, over epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_lines(left, rows, {"loss": "training", "validation_log_loss": "validation"}, "loss")
    named = {"train_ba": "training", "validation_ba": "validation"}
    _draw_lines(right, rows, named, "balanced accuracy at .5")
    show_all_shares(right, "y")
    figure.savefig(path, format="png", dpi=120)


def _draw_lines(
    axes: Axes, rows: Sequence[EpochRow], columns: Mapping[str, str], title: str
) -> None:
    for column, name in columns.items():
        if column in rows[0]:
            measured = [row for row in rows if math.isfinite(row[column])]  # else the line breaks
            epochs = [row["epoch"] for row in measured]
            axes.plot(epochs, [row[column] for row in measured], marker=".", label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
