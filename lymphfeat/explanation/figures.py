"""Figures of an explanation, for notebooks and files: the report's figures 2 and 6, and more."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import zoom
from scipy.special import expit

from lymphfeat.cohort.images import decode_crop
from lymphfeat.explanation.curves import Distribution, roc_curve
from lymphfeat.explanation.explanation import ROLES, Explanation, Subgroups
from lymphfeat.explanation.faithfulness import Deletion
from lymphfeat.explanation.page import colour_limit, extreme_images
from lymphfeat.plots.axes import show_all_shares
from lymphfeat.runtime.arrays import Float32s

# Distinguishable by colour-blind readers, and the same for patients and maps.
TUMORAL, REACTIVE, UNKNOWN = "#b84a00", "#00609c", "#6f7579"
COLORS = {1: TUMORAL, 0: REACTIVE, -1: UNKNOWN}
_NAMES = {1: "tumoral", 0: "reactive", -1: "label unknown"}
_JUDGED = {
    "new": "New patients",
    "out of fold": "Training patients, out of fold",
    "validation": "Validation patients",
    "train": "Training patients (no estimate of how well the model predicts)",
}
_MAP_COLORS = LinearSegmentedColormap.from_list(
    "logit", [(0, (0.0, 0.38, 0.69, 0.6)), (0.5, (1, 1, 1, 0)), (1, (0.88, 0.42, 0.0, 0.6))]
)


def smooth_map(grid: Float32s, side: int) -> Float32s:
    """Upsample a score map (h, w) to (side, side) by cubic splines, within its own range."""
    padded = np.pad(grid, 1, mode="edge")  # keeps the border fields in place
    factor = side / len(grid)
    fine = zoom(padded, factor, order=3, mode="nearest", grid_mode=True)
    margin = (len(fine) - side) // 2
    cut: Float32s = fine[margin : margin + side, margin : margin + side]
    return cut.clip(grid.min(), grid.max())


def draw_cell(pixels: NDArray[np.uint8], grid: Float32s, title: str = "") -> Figure:
    """Draw a cell (side, side, 3), its score map over it, and the raw grid (h, w) of logits."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    cell, over, raw = figure.subplots(1, 3)
    limit = colour_limit(grid[None])
    cell.imshow(pixels)
    over.imshow(pixels)
    shown = over.imshow(smooth_map(grid, len(pixels)), cmap=_MAP_COLORS, vmin=-limit, vmax=limit)
    figure.colorbar(shown, ax=over, shrink=0.8, label="logit: − reactive, + tumoral")
    _draw_grid(raw, grid, numbers=len(grid) <= 8)
    for axes, name in ((cell, "cell"), (over, "score map"), (raw, "raw scores")):
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure


def draw_plate(explanation: Explanation, patient: str, *, columns: int = 10) -> Figure:
    """Draw a patient's cells from the highest score to the lowest, with score and weight.

    Cells used as the highest are framed in the colour of tumoral, as the lowest in that of
    reactive.
    """
    index = explanation.cohort.ids.index(patient)
    begin, end = explanation.cohort.offsets[index : index + 2]
    order = begin + np.argsort(explanation.rank[begin:end])
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(1.15 * columns, 1.33 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    paths = explanation.cohort.images[index]
    for axes in grid:
        axes.set_axis_off()
    for axes, row in zip(grid, order.tolist(), strict=False):
        pixels = decode_crop(paths[row - begin], explanation.subject.crop).pixels
        axes.imshow(pixels.transpose(1, 2, 0))
        score = explanation.images["probability"][row]
        axes.set_title(f"{score:.2f}  {explanation.decisions.weight[row]:.0%}", fontsize=7, pad=2)
        _frame(axes, int(explanation.decisions.mark[row]))
    told = explanation.patients.iloc[index]
    figure.suptitle(
        f"{patient}, {_NAMES[int(explanation.cohort.labels[index])]}: probability "
        f"{told['probability']:.2f}. Score and weight of each cell.",
        fontsize=10,
        color=COLORS[int(explanation.cohort.labels[index])],
    )
    return figure


def draw_differences(explanation: Explanation, patient: str, n: int = 10) -> Figure:
    """Draw the cells farthest from the patient's average cell, and the nearest ones below.

    Each with its distance in units of the patient's mean distance. For heads that read how much
    cells differ, and patients with two images or more.
    """
    distance = explanation.images["distance"].to_numpy()
    index = explanation.cohort.ids.index(patient)
    begin, end = explanation.cohort.offsets[index : index + 2]
    order = begin + np.argsort(-distance[begin:end], kind="stable")
    n = min(n, len(order) // 2)
    figure = Figure(figsize=(1.15 * n + 1.2, 3.05), layout="constrained")
    grid = figure.subplots(2, n, squeeze=False)
    lines = {"most\ndifferent": order[:n], "most\ntypical": order[::-1][:n]}
    for line, (told, rows) in zip(grid, lines.items(), strict=True):
        for axes, row in zip(line, rows.tolist(), strict=True):
            _draw_picture(axes, explanation, row, f"{distance[row]:.1f} ×")
        _draw_heading(line[0], told, "black")
    figure.suptitle(
        f"{patient}, {_NAMES[int(explanation.cohort.labels[index])]}: distance from its average "
        "cell, × the mean distance.",
        fontsize=10,
        color=COLORS[int(explanation.cohort.labels[index])],
    )
    return figure


def draw_grids(explanation: Explanation, patients: Sequence[str] | None = None) -> Figure:
    """Draw patients' cells next to their raw grids, white 1 and black 0 (report, figure 6).

    By default 16 patients evenly spaced over the cohort; up to 6 cells each, highest first. The
    bar at the left shows the patient's label.
    """
    ids = explanation.cohort.ids
    chosen = patients or [
        ids[i] for i in np.linspace(0, len(ids) - 1, min(16, len(ids))).round().astype(int)
    ]
    figure = Figure(figsize=(15, 0.68 * -(-len(chosen) // 2) + 0.5), layout="constrained")
    axes = figure.subplots(-(-len(chosen) // 2), 2, squeeze=False).T.ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, patient in zip(axes, chosen, strict=False):
        _draw_row(axis, explanation, ids.index(patient))
    figure.suptitle(
        "Each cell with its raw scores to the left (white 1, black 0); coloured bar: label",
        fontsize=9,
    )
    return figure


def draw_deletion(deletion: Deletion) -> Figure:
    """Draw how much probabilities change when highest-scored, or random, images are deleted."""
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    k = np.concatenate([[0], deletion.k])
    axes.fill_between(
        k, _from_zero(deletion.random_low), _from_zero(deletion.random_high), color="0.85"
    )
    axes.plot(k, _from_zero(deletion.random), "--", color="0.4", label="random")
    axes.plot(k, _from_zero(deletion.highest), color=TUMORAL, label="highest-scored")
    axes.set(xlabel="images deleted", ylabel="mean change in probability")
    axes.legend(frameon=False)
    return figure


def draw_subgroups(subgroups: Subgroups) -> Figure:
    """Draw the figures of groups of patients with their intervals: a forest plot."""
    rows = subgroups.rows
    names = {"auc": "AUC", "sensitivity": "sensitivity", "specificity": "specificity"}
    figure = Figure(figsize=(11, 0.32 * len(rows) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    places = np.arange(len(rows))
    for axes, (name, told) in zip(panels, names.items(), strict=True):
        low, value, high = (rows[f"{name}{end}"].to_numpy() for end in ("_low", "", "_high"))
        axes.hlines(places, low, high, color="0.5")
        axes.plot(value, places, "o", color=REACTIVE, markersize=5)
        axes.axvline(value[0], color="0.6", linestyle=":")
        axes.set(xlabel=told, xlim=(-0.02, 1.02))
    titles = [
        f"{row.by} {row.group}".strip() + f" ({row.reactive} + {row.tumoral})"
        for row in rows.itertuples()
    ]
    panels[0].set_yticks(places, titles)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{_JUDGED[subgroups.of]}: results by subgroup (reactive + tumoral patients), 95 % "
        "intervals; dotted: all patients",
        fontsize=9,
    )
    return figure


def draw_weights(explanation: Explanation, patient: str) -> Figure:
    """Draw a patient's logits, and for `bnsigmoid` the weight they get (report, figure 2)."""
    found = Distribution.of(explanation.subject, explanation.maps, explanation.cohort.n_images)
    counts = found.counts[explanation.cohort.ids.index(patient)]
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.stairs(counts / counts.sum(), found.edges, fill=True, color=REACTIVE, alpha=0.7)
    normalised = "" if found.weight is None else "normalised "
    axes.set(xlabel=f"{normalised}logit", ylabel=f"share of {patient}'s {found.instances}")
    if found.weight is not None:
        right = axes.twinx()
        right.plot((found.edges[1:] + found.edges[:-1]) / 2, found.weight, color=TUMORAL)
        right.set_ylabel("weight")
        show_all_shares(right, "y")
    return figure


def draw_cohort(explanation: Explanation) -> Figure:
    """Draw the ROC curves, and probabilities against bag size and the first numeric attributes."""
    table = explanation.cohort.table
    numeric = [n for n in explanation.cohort.covariates if pd.api.types.is_numeric_dtype(table[n])]
    figure = Figure(figsize=(4 * (2 + len(numeric[:2])), 3.6), layout="constrained")
    axes = figure.subplots(1, 2 + len(numeric[:2]))
    _draw_roc(axes[0], explanation)
    _draw_scatter(axes[1], explanation, explanation.cohort.n_images.astype(float), "images")
    for axis, name in zip(axes[2:], numeric[:2], strict=True):
        _draw_scatter(axis, explanation, table[name].to_numpy(float), name)
    return figure


def draw_extremes(explanation: Explanation, n: int = 10) -> Figure:
    """Draw the cohort's highest and lowest cells of each class, one per patient."""
    figure = Figure(figsize=(1.05 * n + 1.2, 5.2), layout="constrained")
    grid = figure.subplots(4, n, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for half, label in enumerate((1, 0)):
        for line, (end, rows) in enumerate(extreme_images(explanation, label).items()):
            for axes, row in zip(grid[2 * half + line], rows, strict=False):
                score = explanation.images["probability"][row]
                _draw_picture(axes, explanation, row, f"{score:.2f}")
            _draw_heading(grid[2 * half + line, 0], f"{_NAMES[label]}\n{end}", COLORS[label])
    return figure


def _draw_picture(axes: Axes, explanation: Explanation, row: int, caption: str) -> None:
    patient = int(explanation.patient[row])
    path = explanation.cohort.images[patient][row - explanation.cohort.offsets[patient]]
    axes.imshow(decode_crop(path, explanation.subject.crop).pixels.transpose(1, 2, 0))
    axes.set_title(caption, fontsize=7, pad=2)
    axes.set_axis_off()


def _draw_heading(axes: Axes, text: str, color: str) -> None:
    """Write a line's heading to the left of its first picture."""
    axes.text(
        -0.15,
        0.5,
        text,
        transform=axes.transAxes,
        ha="right",
        va="center",
        fontsize=9,
        color=color,
    )


def _draw_grid(axes: Axes, grid: Float32s, numbers: bool) -> None:
    scores: Float32s = expit(grid)
    axes.imshow(scores, cmap="gray", vmin=0, vmax=1)
    for (y, x), score in np.ndenumerate(scores) if numbers else ():
        color = "black" if score > 0.5 else "white"
        axes.text(x, y, f"{score:.2f}", ha="center", va="center", fontsize=8, color=color)


def _frame(axes: Axes, mark: int) -> None:
    if mark:
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=TUMORAL if mark > 0 else REACTIVE, linewidth=2.5)


def _draw_row(axes: Axes, explanation: Explanation, index: int, cells: int = 6) -> None:
    """Draw a patient's cells as a strip: grid and picture, grid and picture, …"""
    begin, end = explanation.cohort.offsets[index : index + 2]
    order = np.argsort(explanation.rank[begin:end])[:cells]
    side = explanation.subject.crop
    strip = np.full((side, 2 * cells * side, 3), 255, np.uint8)
    for place, row in enumerate(order.tolist()):
        scores = 255 * expit(explanation.maps[begin + row])  # (h, w)
        raw = np.kron(scores, np.ones((-(-side // len(scores)),) * 2))[:side, :side]
        picture = decode_crop(explanation.cohort.images[index][row], side).pixels
        strip[:, 2 * place * side : (2 * place + 1) * side] = raw[:, :, None].astype(np.uint8)
        strip[:, (2 * place + 1) * side : (2 * place + 2) * side] = picture.transpose(1, 2, 0)
    axes.imshow(strip)
    label = int(explanation.cohort.labels[index])
    axes.axvline(-side / 6, color=COLORS[label], linewidth=5)
    told = f"{explanation.cohort.ids[index]}  {explanation.predicted[index]:.2f}"
    axes.text(-side / 3, side / 2, told, ha="right", va="center", fontsize=8)
    axes.set_xlim(-side / 4, strip.shape[1])


def _from_zero(values: Float32s) -> Float32s:
    started: Float32s = np.concatenate([[0], values]).astype(np.float32)
    return started


def _draw_roc(axes: Axes, explanation: Explanation) -> None:
    table = explanation.patients[explanation.patients["label"].notna()]
    for role, style in (("train", "--"), ("validation", "-"), ("new", "-")):
        own = table[table["role"] == role]
        if own["label"].nunique() == 2:
            points = roc_curve(own["probability"].to_numpy(float), own["label"].to_numpy(np.int64))
            color = {"train": "0.5", "validation": REACTIVE, "new": TUMORAL}[role]
            axes.plot(points[:, 0], points[:, 1], style, color=color, label=ROLES[role])
            axes.legend(frameon=False, fontsize=8)
    axes.plot([0, 1], [0, 1], ":", color="0.7")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")
    show_all_shares(axes, "x")
    show_all_shares(axes, "y")


def _draw_scatter(
    axes: Axes, explanation: Explanation, values: NDArray[np.float64], name: str
) -> None:
    for label, marker in ((1, "^"), (0, "o"), (-1, "x")):
        own = (explanation.cohort.labels == label) & np.isfinite(values)
        axes.scatter(
            values[own],
            explanation.predicted[own],
            s=18,
            marker=marker,
            color=COLORS[label],
            label=_NAMES[label],
        )
    given = values[np.isfinite(values)]
    if len(given) and given.min() > 0 and given.max() > 20 * given.min():
        axes.set_xscale("log")
    axes.axhline(explanation.model.threshold, color="0.6", linestyle=":")
    axes.set(xlabel=name, ylabel="probability")
    show_all_shares(axes, "y")
