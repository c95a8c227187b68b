"""Figures 3 and 5 of the report, redrawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lymphfeat.plots.axes import draw_grid

FIGURE_5 = (
    "mean, all images",
    "mean, 10 images",
    "bnsigmoid, ResNet-18",
    "bnsigmoid, 10 images",
)
_BARS = {"report": "#9ecae1", "honest": "#3182bd"}


def draw_depths(table: pd.DataFrame, path: Path) -> None:
    """Draw the report's figure 3: depth of ResNet against validation loss and balanced accuracy."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name.removeprefix("bnsigmoid, ") for name in table["name"]]
    _bars(left, table, names, {"report": "report_log_loss", "honest": "honest_log_loss"})
    left.set_ylabel("validation loss, 95 % interval")
    _accuracies(right, table, names)
    _legend(figure, right)
    figure.suptitle("Impact of ResNet depth (report, figure 3), heads on frozen maps")
    figure.savefig(path, dpi=130)


def draw_subsets(table: pd.DataFrame, path: Path) -> None:
    """Draw the report's figure 5: all images against 10 drawn again at every step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ordered = table.set_index("name").loc[[n for n in FIGURE_5 if n in set(table["name"])]]
    names = [name.replace(", ", "\n").replace("ResNet-18", "all images") for name in ordered.index]
    axes = figure.subplots()
    _accuracies(axes, ordered, names)
    _legend(figure, axes)
    figure.suptitle("Subsets of 10 images (report, figure 5), heads on frozen maps")
    figure.savefig(path, dpi=130)


def _accuracies(axes: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    _bars(axes, table, names, {"report": "report", "honest": "honest"})
    places = np.arange(len(table))
    axes.errorbar(
        places,
        table["published"],
        yerr=table["published_half_width"],
        fmt="D",
        color="#c0392b",
        markersize=5,
        label="published, ± as published",
    )
    axes.set_ylabel("balanced accuracy, 95 % interval")
    lowest = float(table[["report", "report_low", "honest", "honest_low"]].min().min())
    axes.set_ylim(max(0.0, min(lowest - 0.05, 0.7)), 1)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _bars(
    axes: Axes, table: pd.DataFrame, names: Sequence[str], columns: Mapping[str, str]
) -> None:
    places = np.arange(len(table))
    for shift, (label, column) in zip((-0.2, 0.2), columns.items(), strict=True):
        ends = table[column] - table[f"{column}_low"], table[f"{column}_high"] - table[column]
        axes.bar(
            places + shift,
            table[column],
            0.38,
            yerr=[end.fillna(0) for end in ends],
            color=_BARS[label],
            label=label,
            capsize=4,
        )
    axes.set_xticks(places, names)
    draw_grid(axes, "y")
