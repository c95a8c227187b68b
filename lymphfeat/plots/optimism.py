"""The plot of both protocols: the accuracies of every row, and their difference."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lymphfeat.plots.axes import bound_shares, draw_grid, draw_interval

_PROTOCOLS = (
    ("report", "report: epochs chosen on the evaluated patients", 0.12, "#c0392b"),
    ("honest", "honest", -0.12, "#1f77b4"),
)


def draw_optimism(table: pd.DataFrame, path: Path) -> None:
    """Draw the accuracies of every head under both protocols, and their difference, as a PNG."""
    figure = Figure(figsize=(12, max(3.0, 0.42 * len(table) + 1.4)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 3), sharey=True)
    for y, row in enumerate(table.iloc[::-1].to_dict("records")):
        for name, label, shift, color in _PROTOCOLS:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            named = label if y == 0 else None
            draw_interval(left, row[name], y + shift, low, high, fmt="o", color=color, label=named)
        low, high = row["optimism_low"], row["optimism_high"]
        draw_interval(right, row["optimism"], y, low, high, fmt="o", color="black")
    left.set_yticks(range(len(table)), table["head"].iloc[::-1])
    left.axvline(0.5, color="0.7", linestyle=":", linewidth=1)
    right.axvline(0, color="0.5", linewidth=1)
    left.set_xlabel("balanced accuracy, corrected 95 % t interval")
    right.set_xlabel("report − honest, 95 % bootstrap interval")
    bound_shares(left, "x")
    draw_grid(left, "x")
    draw_grid(right, "x")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
