"""The plot of a run: every row with its interval, learning curves, and calibration."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lymphfeat.evaluation.calibration import reliability
from lymphfeat.evaluation.protocol import Outcome
from lymphfeat.evaluation.scores import BAG_SIZE, CLINICAL
from lymphfeat.plots.axes import bound_shares, draw_grid, draw_interval, show_all_shares
from lymphfeat.settings import FitSettings

Color = tuple[float, float, float, float]

_SHOWN_CURVES = 8  # more lines than this cannot be distinguished
_SHOWN_RELIABILITIES = 3
_GREY = (0.6, 0.6, 0.6, 1.0)
_BASELINES = {BAG_SIZE: ("--", "#b8860b"), CLINICAL: ("-.", "#6a5acd")}  # lines in every panel
_MARKERS: Mapping[str, str] = {
    "head": "o",
    "fusion": "D",
    "selected": "^",
    "average": "v",
    "baseline": "s",
}


def draw_summary(outcome: Outcome, settings: FitSettings, path: Path) -> None:
    """Draw the summary table, the learning curves and the reliability of a run as a PNG."""
    calibrated = "calibrated" in outcome.predictions
    height = max(5.2, 0.32 * len(outcome.summary) + 1.6)
    figure = Figure(figsize=(17 if calibrated else 12, height), layout="constrained")
    ratios = (3, 4, 3) if calibrated else (3, 4)
    panels = figure.subplots(1, len(ratios), width_ratios=ratios)
    colors = _colors(outcome.summary)
    _draw_intervals(panels[0], outcome.summary, colors)
    _draw_curves(panels[1], outcome, colors)
    if calibrated:
        _draw_reliability(panels[2], outcome, colors)
    n = outcome.summary["runs"].iloc[0]
    epochs = (
        "mean of the ten best epochs"
        if settings.protocol == "report"
        else f"{settings.epoch} epoch"
    )
    figure.suptitle(f"{settings.protocol} protocol: {n} splits per row, {epochs}")
    figure.savefig(path, dpi=130)


def _colors(summary: pd.DataFrame) -> dict[str, Color]:
    palette = colormaps["tab10"]
    heads = summary.loc[summary["kind"] == "head", "head"][:_SHOWN_CURVES]
    own = {str(name): palette(i) for i, name in enumerate(heads)}
    return {str(name): own.get(str(name), _GREY) for name in summary["head"]}


def _draw_intervals(axes: Axes, summary: pd.DataFrame, colors: dict[str, Color]) -> None:
    rows = summary.iloc[::-1].to_dict("records")
    for y, row in enumerate(rows):
        marker = _MARKERS[row["kind"]]
        color = (
            "black" if row["kind"] in ("baseline", "selected", "average") else colors[row["head"]]
        )
        draw_interval(axes, row["ba"], y, row["ba_low"], row["ba_high"], fmt=marker, color=color)
        if "ba_last" in row and row["kind"] == "head":
            axes.plot(row["ba_last"], y, marker, color=color, markerfacecolor="white", zorder=3)
    axes.set_yticks(range(len(rows)), [row["head"] for row in rows])
    for name, (line, color) in _BASELINES.items():
        for ba in summary.loc[summary["head"] == name, "ba"]:
            axes.axvline(ba, color=color, linestyle=line, linewidth=1)
    axes.axvline(0.5, color="0.7", linestyle=":", linewidth=1)
    hollow = "; hollow: last epoch" if "ba_last" in summary else ""
    axes.set_xlabel(f"balanced accuracy, 95 % interval{hollow}")
    bound_shares(axes, "x")
    draw_grid(axes, "x")


def _draw_curves(axes: Axes, outcome: Outcome, colors: dict[str, Color]) -> None:
    curves = outcome.epochs.groupby(["head", "epoch"])["auc"].mean()
    summary = outcome.summary
    heads = summary.loc[summary["kind"] == "head", "head"]
    for name in heads[:_SHOWN_CURVES]:
        curve = curves[name]
        axes.plot(curve.index, curve.to_numpy(), color=colors[name], label=name)
    for name, (line, color) in _BASELINES.items():
        for auc in summary.loc[summary["head"] == name, "auc"]:
            axes.axhline(auc, color=color, linestyle=line, linewidth=1, label=f"{name} alone")
    hidden = len(heads) - _SHOWN_CURVES
    title = f"best {_SHOWN_CURVES} of {len(heads)}" if hidden > 0 else None
    _legend_below(axes, title, columns=3)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("validation ROC-AUC, mean over splits")
    bound_shares(axes, "y")
    draw_grid(axes)


def _draw_reliability(axes: Axes, outcome: Outcome, colors: dict[str, Color]) -> None:
    """Draw the best rows before (thin) and after calibration, over the patients of all repeats."""
    summary = outcome.summary
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    heads = summary[summary["kind"] == "head"].head(_SHOWN_RELIABILITIES)
    for row in heads.to_dict("records"):
        table = outcome.predictions[outcome.predictions["head"] == row["head"]]
        labels = table["label"].to_numpy(np.int64)
        before = reliability(table["probability"].to_numpy(float), labels)
        after = reliability(table["calibrated"].to_numpy(float), labels)
        color = colors[row["head"]]
        axes.plot(before.predicted, before.observed, color=color, linewidth=1, linestyle="--")
        axes.plot(after.predicted, after.observed, color=color, marker="o", markersize=4)
        label = f"{row['head']}: {row['ece']:.3f} → {row['ece_calibrated']:.3f}"
        axes.plot([], [], color=color, label=label)
    title = "calibration error, raw (dashed) → calibrated (solid)"
    _legend_below(axes, title, columns=1)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("share of tumoral patients")
    show_all_shares(axes, "x")
    show_all_shares(axes, "y")
    draw_grid(axes)


def _legend_below(axes: Axes, title: str | None, columns: int) -> None:
    """Put the legend below the axes, where it hides no curve."""
    axes.legend(
        title=title,
        ncols=columns,
        fontsize="small",
        title_fontsize="small",
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
    )
