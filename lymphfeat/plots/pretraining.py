"""The plot of a pre-training's learning curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lymphfeat.plots.axes import show_all_shares

PROBED = {
    "patients": "nearest cell is from the same patient",
    "classes": "nearest cell is from the same class",
    "none": "",  # one group: nothing to distinguish
}


def draw_curve(rows: Sequence[Mapping[str, float]], path: Path, grouping: str) -> None:
    """Draw the loss and the nearest-neighbour probe over epochs as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = rows[1:]
    left.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], marker=".")
    left.set_ylabel("loss")
    right.plot([row["epoch"] for row in rows], [row["probe"] for row in rows], marker=".")
    right.set_ylabel(PROBED[grouping])
    show_all_shares(right, "y")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
