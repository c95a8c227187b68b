"""The plot of a comparison: the result of every row, and its difference from the reference."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lymphfeat.evaluation.comparison import Comparison
from lymphfeat.evaluation.metrics import metric_bounds
from lymphfeat.plots.axes import bound_shares, draw_grid, draw_interval
from lymphfeat.runtime.files import replace_file

_DIFFERENT, _NOT = "#c0392b", "0.45"
NAMES = {
    "ba": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "auc": "ROC-AUC",
    "log_loss": "log loss",
    "brier": "Brier score",
}


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw every row's values and interval, and every pair's difference, in the suffix's format."""
    n = max(len(comparison.rows), len(comparison.pairs))
    figure = Figure(figsize=(12, max(3.0, 0.36 * n + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_rows(left, comparison)
    _draw_pairs(right, comparison)
    figure.suptitle(f"{comparison.protocol} protocol, {len(comparison.values)} splits, paired")
    kind = path.suffix[1:] or "png"
    replace_file(path, lambda unfinished: figure.savefig(unfinished, format=kind, dpi=130))


def _draw_rows(axes: Axes, comparison: Comparison) -> None:
    rows = comparison.rows.iloc[::-1].to_dict("records")
    for y, row in enumerate(rows):
        values = comparison.values[row["name"]].to_numpy(float)
        spread = y + np.linspace(-0.25, 0.25, len(values))
        axes.plot(values, spread, ".", color="0.6", markersize=4, zorder=1)
        draw_interval(axes, row["mean"], y, row["low"], row["high"], fmt="o", color="black")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel(f"{NAMES[comparison.metric]}: splits, mean, 95 % interval")
    if metric_bounds(comparison.metric)[1] == 1:
        bound_shares(axes, "x")
    draw_grid(axes, "x")


def _draw_pairs(axes: Axes, comparison: Comparison) -> None:
    pairs = comparison.pairs.iloc[::-1].to_dict("records")
    for y, pair in enumerate(pairs):
        color = _DIFFERENT if pair["p_adjusted"] < 0.05 else _NOT
        draw_interval(axes, pair["difference"], y, pair["low"], pair["high"], fmt="o", color=color)
        known = np.isfinite(pair["p_adjusted"])
        axes.annotate(
            f"p {pair['p_adjusted']:.2g}" if known else "no interval (one split)",
            (pair["difference"], y),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            color=color,
        )
    axes.set_yticks(range(len(pairs)), [f"{p['name']} − {p['reference']}" for p in pairs])
    axes.set_ylim(-0.6, len(pairs) - 0.3)
    axes.axvline(0, color="0.5", linewidth=1)
    last = "; against baselines at the last epoch" if comparison.pairs["last_epoch"].any() else ""
    axes.set_xlabel(f"difference, simultaneous 95 % interval, Holm's p{last}")
    draw_grid(axes, "x")
