"""What was measured: lines of the table, ratios repeat by repeat, goals; a file per row."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.measure import LIMIT, OURS

PACKAGES = ("lymphfeat", "torch", "timm", "h5py", "numpy", "torchmil")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a line should reach: a figure of ours, or how many times as fast as another we are."""

    text: str
    at_most: float | None = None  # of our figure
    at_least: float | None = None  # of our speed by that of `against`
    against: str = LIMIT


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of some repeats, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=float(np.median(values)), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: every contestant's figure in every repeat."""

    name: str
    unit: str  # of the figures; those per second are better the higher, others the lower
    samples: Mapping[str, Sequence[float]]  # by contestant; of `OURS` at least
    goals: Sequence[Goal] = ()
    note: str = ""
    stopped: bool = False  # ours took longer than it says
    drawn: bool = True  # whether the figure shows it; the limit of a start is no work at all

    @property
    def beside(self) -> tuple[str, ...]:
        """The contestants other than ours and the limit."""
        return tuple(name for name in self.samples if name not in (OURS, LIMIT))

    @property
    def repeats(self) -> int:
        return len(self.samples[OURS])

    def figure(self, name: str) -> Spread:
        """Return what a contestant reached."""
        return Spread.of(self.samples[name])

    def speed(self, name: str, against: str) -> Spread:
        """Return how many times as fast as another a contestant is, repeat by repeat."""
        pairs = zip(self.samples[name], self.samples[against], strict=True)
        higher_is_better = self.unit.endswith("/s")
        return Spread.of([a / b if higher_is_better else b / a for a, b in pairs])

    def is_met(self, goal: Goal) -> bool | None:
        """Return whether the median meets a goal; None where it could not be measured."""
        if goal.at_most is not None:
            median = self.figure(OURS).median
            return median <= goal.at_most if median > goal.at_most or not self.stopped else None
        if goal.at_least is None or goal.against not in self.samples:
            return None
        return self.speed(OURS, goal.against).median >= goal.at_least

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Line":
        goals = [Goal(**goal) for goal in content.pop("goals")]
        return cls(**content, goals=goals)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row, measured: its lines, when, and on what."""

    row: str
    date: str
    machine: Mapping[str, Any]  # processor, cores, threads, versions
    lines: Sequence[Line]

    @classmethod
    def now(cls, row: str, lines: Sequence[Line], threads: int) -> "Result":
        return cls(
            row=row, date=date.today().isoformat(), machine=describe_machine(threads), lines=lines
        )

    def write(self, folder: Path) -> None:
        """Write the row's file; those of other rows stay."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (folder / f"{self.row}.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Result":
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = [Line.from_json(line) for line in content.pop("lines")]
        return cls(**content, lines=lines)


def number(value: float) -> str:
    """Return a number with three figures, without an exponent: 0.00123, 0.450, 45.3, 1,230."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text.rstrip(".")


def describe_machine(threads: int) -> dict[str, Any]:
    """Describe the processor, the threads and the versions."""
    import torch

    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := _version(name))},
    }


def cores() -> int:
    """Return how many processor cores this process may use."""
    import os

    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or "unknown processor"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
