"""The figure of a run: every head's balanced accuracy with its interval, and its learning curve."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lymphfeat.heads import head_name
from lymphfeat.protocol import Outcome
from lymphfeat.settings import FitSettings

_SHOWN_CURVES = 8  # more lines than this cannot be told apart


def draw_summary(outcome: Outcome, settings: FitSettings, path: Path) -> None:
    """Draw the summary table and the learning curves of a run as a PNG."""
    names = outcome.summary["head"].tolist()
    figure = Figure(figsize=(12, max(4.0, 0.32 * len(names) + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    palette = colormaps["tab10"]
    colors = {
        name: palette(i) if i < _SHOWN_CURVES else (0.6, 0.6, 0.6, 1.0)
        for i, name in enumerate(names)
    }
    _draw_intervals(left, outcome, colors)
    _draw_curves(right, outcome, colors)
    n = outcome.summary["runs"].iloc[0]
    figure.suptitle(f"{settings.protocol} protocol, {n} runs a head, {settings.epochs} epochs")
    figure.savefig(path, dpi=130)


def _draw_intervals(
    axes: Axes, outcome: Outcome, colors: dict[str, tuple[float, float, float, float]]
) -> None:
    table = outcome.summary.iloc[::-1].reset_index(drop=True)
    for row, (name, ba, half) in enumerate(
        zip(table["head"], table["ba"], table["ba_half_width"], strict=True)
    ):
        axes.errorbar(ba, row, xerr=0 if np.isnan(half) else half, fmt="o", color=colors[name])
    axes.set_yticks(range(len(table)), table["head"])
    axes.axvline(0.5, color="0.7", linestyle=":", linewidth=1)
    axes.set_xlabel("balanced accuracy, 95 % interval")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)


def _draw_curves(
    axes: Axes, outcome: Outcome, colors: dict[str, tuple[float, float, float, float]]
) -> None:
    curves = outcome.epochs.groupby(["head", "epoch"])["auc"].mean()
    for name in outcome.summary["head"][:_SHOWN_CURVES]:
        curve = curves[name]
        axes.plot(curve.index, curve.to_numpy(), color=colors[name], label=name)
    labels = {head_name(head) for head in outcome.heads}
    hidden = len(labels) - _SHOWN_CURVES
    title = f"best {_SHOWN_CURVES} of {len(labels)}" if hidden > 0 else None
    axes.legend(title=title, fontsize="small", frameon=False, loc="lower right")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation ROC-AUC, mean of runs")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
