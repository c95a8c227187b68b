"""What the axes of figures share: bounds of shares, error bars, a quiet grid."""

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

Which = Literal["x", "y"]


def bound_shares(axes: Axes, which: Which) -> None:
    """Cut an axis of shares (balanced accuracy, AUC, probability) off at 0 and 1.

    What lies on a bound is drawn whole, over the frame. Call it when all is drawn.
    """
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    low, high = max(low, 0.0), min(high, 1.0)
    if which == "x":
        axes.set_xlim(low, high)
    else:
        axes.set_ylim(low, high)
    for artist in (*axes.lines, *axes.collections):
        artist.set_clip_on(False)


def show_all_shares(axes: Axes, which: Which) -> None:
    """Let an axis of shares run from 0 to 1. Call it when all is drawn."""
    if which == "x":
        axes.set_xlim(0, 1)
    else:
        axes.set_ylim(0, 1)
    bound_shares(axes, which)


def draw_interval(
    axes: Axes, value: float, y: float, low: float, high: float, **style: Any
) -> None:
    """Draw a value at height `y` with its interval from `low` to `high`, NaN if it has none."""
    known = np.isfinite(low) and np.isfinite(high)
    axes.errorbar(value, y, xerr=[[value - low], [high - value]] if known else None, **style)


def draw_grid(axes: Axes, which: Which | Literal["both"] = "both") -> None:
    """Draw a grid behind everything else."""
    axes.grid(axis=which, color="0.92")
    axes.set_axisbelow(True)
