"""The table and the figure, from what was measured, written between two marks of a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench.measure import LIMIT, OURS, ROOT
from benchmarks.bench.results import Goal, Line, Result, Spread, number
from lymphfeat.plots.axes import draw_grid

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured by make bench -->", "<!-- end of what was measured -->"
COLUMNS = ("what", "lymphfeat", "beside it", "limit", "× beside it", "× limit", "goal", "met")
_WIDEST = 1.6  # of the figure; longer bars are cut off, their labels say how long they are
_OURS_COLOUR, _BESIDE_COLOUR, _GOAL_COLOUR = "#2a6f97", "#c3ccd3", "#b3202c"


def write_page(page: Path, results: Sequence[Result]) -> None:
    """Write the table and the figure beside a page; its text outside the marks stays."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    figure = page.with_suffix("") / "limit.svg"
    lines = [line for result in results for line in result.lines]
    figure.parent.mkdir(exist_ok=True)
    drawn = [line for line in lines if line.drawn and LIMIT in line.samples]
    draw(drawn).savefig(figure, metadata={"Date": None}, bbox_inches="tight")
    shown = f"![Speed by the limit's, row by row]({page.stem}/{figure.name})\n\n"
    page.write_text(f"{before}{BEGIN}\n{shown}{render(results)}{END}{after}", encoding="utf-8")


# --- table ----------------------------------------------------------------------------------------


def render(results: Sequence[Result]) -> str:
    """Return a table for every machine, with notes below it."""
    machines: dict[str, list[Result]] = {}
    for result in results:
        machines.setdefault(json.dumps(result.machine, sort_keys=True), []).append(result)
    return "\n".join(_of_machine(own) for own in machines.values())


def _of_machine(results: Sequence[Result]) -> str:
    lines = [line for result in results for line in result.lines]
    dates = sorted({result.date for result in results})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, lines)]
    return "\n".join(
        [
            f"{_describe(results[0].machine)} Measured {when}.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *(f"- **{line.name}** ({_repeats(line)}): {line.note}" for line in lines),
            "",
        ]
    )


def _describe(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    return (
        f"{machine['processor']} ({machine['instructions']}), {_count(machine['cores'], 'core')}, "
        f"{_count(machine['threads'], 'thread')}, {machine['system']}; {versions}."
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _repeats(line: Line) -> str:
    return "once" if line.repeats == 1 else f"{line.repeats} times"


def _cells(line: Line) -> tuple[str, ...]:
    limit = [LIMIT] if LIMIT in line.samples else []
    return (
        line.name,
        ("> " if line.stopped else "") + _shown(line.figure(OURS), line.unit),
        _stack(f"{name}: {_shown(line.figure(name), line.unit)}" for name in line.beside),
        _stack(_shown(line.figure(name), line.unit) for name in limit),
        _stack(_shown(line.speed(OURS, name)) for name in line.beside),
        _stack(_shown(line.speed(OURS, name)) for name in limit),
        _stack(goal.text for goal in line.goals),
        _stack(_met(line, goal) for goal in line.goals),
    )


def _stack(cells: Any) -> str:
    return "<br>".join(cells) or "–"


def _met(line: Line, goal: Goal) -> str:
    met = line.is_met(goal)
    return "not measured" if met is None else "yes" if met else "**no**"


def _shown(spread: Spread, unit: str = "") -> str:
    """Return a median with its range, if there is more than one repeat: 230 (221–236) images/s."""
    numbers = [number(value) for value in (spread.median, spread.low, spread.high)]
    ends = f" ({numbers[1]}–{numbers[2]})" if spread.low < spread.high else ""
    return f"{numbers[0]}{ends} {unit}".strip()


# --- figure ---------------------------------------------------------------------------------------


def draw(lines: Sequence[Line]) -> Figure:
    """Draw the speed of every contestant by the limit's: 1 is the limit, a red tick the goal."""
    bars = [1 + len(line.beside) for line in lines]
    tops = np.cumsum([0, *(n + 1 for n in bars)])  # a bar's height between lines
    figure = Figure(figsize=(8, 0.8 + 0.19 * tops[-1]))
    axes = figure.add_subplot()
    for top, line in zip(tops, lines, strict=False):
        _draw_line(axes, int(top), line)
    axes.axvline(1, color="0.2", linewidth=1, zorder=1.5)
    middles = [top + (n - 1) / 2 for top, n in zip(tops, bars, strict=False)]
    axes.set_yticks(middles, [line.name for line in lines], fontsize=8)
    axes.set_ylim(tops[-1] - 1, -1)  # the first line on top
    axes.set_xlim(0, _WIDEST)
    axes.set_xlabel("speed by that of the limit (thin lines: lowest to highest repeat)", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    draw_grid(axes, "x")
    return figure


def _draw_line(axes: Axes, top: int, line: Line) -> None:
    for rank, name in enumerate((OURS, *line.beside)):
        spread = line.speed(name, LIMIT)
        colour = _OURS_COLOUR if name == OURS else _BESIDE_COLOUR
        axes.barh(top + rank, spread.median, 0.85, color=colour)
        ends = [min(value, _WIDEST) for value in (spread.low, spread.high)]
        axes.plot(ends, [top + rank] * 2, color="0.25", linewidth=1)
        label = f"  {name} {spread.median:.2g}"
        axes.text(ends[1], top + rank, label, va="center", fontsize=7, color="0.15")
    for goal in line.goals:
        if goal.against == LIMIT and goal.at_least is not None:
            ends = [top - 0.55, top + len(line.beside) + 0.55]
            axes.plot([goal.at_least] * 2, ends, color=_GOAL_COLOUR, linewidth=1.5)
