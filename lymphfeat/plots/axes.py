"""What all plots share: axes bounded to [0, 1], error bars, a light grid."""

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

Which = Literal["x", "y"]


def bound_shares(axes: Axes, which: Which) -> None:
    """Clip the range of an axis of shares (balanced accuracy, AUC, probability) to [0, 1].

    Markers on a bound are drawn whole, over the frame. Call this after drawing everything.
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
    """Make an axis of shares run from 0 to 1. Call this after drawing everything."""
    if which == "x":
        axes.set_xlim(0, 1)
    else:
        axes.set_ylim(0, 1)
    bound_shares(axes, which)


def draw_interval(
    axes: Axes, value: float, y: float, low: float, high: float, **style: Any
) -> None:
    """Draw a value at height `y` with its interval from `low` to `high`; NaN bounds draw none."""
    known = np.isfinite(low) and np.isfinite(high)
    axes.errorbar(value, y, xerr=[[value - low], [high - value]] if known else None, **style)


def draw_grid(axes: Axes, which: Which | Literal["both"] = "both") -> None:
    """Draw a grid behind everything else."""
    axes.grid(axis=which, color="0.92")
    axes.set_axisbelow(True)
