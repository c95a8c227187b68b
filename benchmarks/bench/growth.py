"""How time and memory grow with images, heads and bags; each size in a process of its own.

The limit is a straight line: through the smallest size, which shows what every run begins with, and
the largest but one, on to the largest.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import lymphfeat as lf
from benchmarks.bench.inputs import bag_sizes, dealt_out, write_random_store
from benchmarks.bench.measure import (
    LIMIT,
    OURS,
    Bench,
    environment,
    in_turn,
    peak_megabytes,
    seconds_of,
)
from benchmarks.bench.results import Goal, Line, number
from lymphfeat.features.store import MapShape
from lymphfeat.settings import (
    BackboneSettings,
    ExtractSettings,
    FitSettings,
    HeadGrid,
    HeadSettings,
)

GOALS = (Goal(text="≤ 1.2 × a straight line", at_least=1 / 1.2),)
MAPS = MapShape(views=1, channels=128, height=2, width=2)  # small, so that 10⁶ of them fit


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Something that grows: the sizes, what is read at each, and the job that reads it."""

    name: str
    unit: str
    job: str
    sizes: Sequence[int]
    make: Callable[[int], Path]
    note: str


def images_extracted(bench: Bench) -> list[Line]:
    growth = Growth(
        name="images extracted",
        unit="images",
        job="extract",
        sizes=(20, 40, 60) if bench.quick else (1_000, 10_000, 30_000),
        make=lambda n: dealt_out(bench, bag_sizes(bench.size(200, 4), n)),
        note="ResNet-18, crop 112",
    )
    return _lines(bench, growth)


def images_fitted(bench: Bench) -> list[Line]:
    growth = Growth(
        name="images fitted",
        unit="images",
        job="fit",
        sizes=(200, 400, 800) if bench.quick else (10_000, 100_000, 300_000, 1_000_000),
        make=lambda n: _store(bench, bag_sizes(bench.size(200, 20), n)),
        note="bnsigmoid, 5 folds, 5 epochs, 128×2×2 maps, 200 patients",
    )
    return _lines(bench, growth)


def heads(bench: Bench) -> list[Line]:
    few = _store(bench, bag_sizes(40, bench.size(2000, 200)))
    growth = Growth(
        name="heads",
        unit="heads",
        job="heads",
        sizes=(1, 4, 8) if bench.quick else (1, 10, 100, 300, 1_000),
        make=lambda n: few,
        note="bnsigmoid at as many learning rates, 5 folds, 5 epochs, 40 patients",
    )
    return _lines(bench, growth)


def images_per_bag(bench: Bench) -> list[Line]:
    growth = Growth(
        name="images per bag",
        unit="images of a bag",
        job="fit",
        sizes=(10, 20, 40) if bench.quick else (10, 100, 1_000, 2_000, 5_000),
        make=lambda n: _store(bench, np.full(40, n)),
        note="bnsigmoid, 5 folds, 5 epochs, 128×2×2 maps, 40 patients",
    )
    return _lines(bench, growth)


def _store(bench: Bench, sizes: np.ndarray) -> Path:
    path = bench.new("random.h5")
    write_random_store(path, sizes, MAPS)
    return path


def _lines(bench: Bench, growth: Growth) -> list[Line]:
    inputs = {size: growth.make(size) for size in growth.sizes}
    megabytes: dict[str, list[float]] = {str(size): [] for size in growth.sizes}

    def contestant(size: int) -> Callable[[], float]:
        def run_once() -> float:
            ran = _run_job(bench, growth.job, inputs[size], size)
            megabytes[str(size)].append(ran["megabytes"])
            return ran["seconds"]

        return run_once

    _run_job(bench, growth.job, inputs[growth.sizes[0]], growth.sizes[0])  # reads torch from disk
    seconds = in_turn(bench, {str(size): contestant(size) for size in growth.sizes}, warm_up=False)
    return [
        _line(growth, "time", "s", seconds),
        _line(growth, "memory", "MB", megabytes),
    ]


def _line(growth: Growth, what: str, unit: str, samples: dict[str, list[float]]) -> Line:
    first, *_, middle, last = growth.sizes
    repeats = zip(samples[str(first)], samples[str(middle)], strict=True)
    straight = [low + (high - low) / (middle - first) * (last - first) for low, high in repeats]
    medians = {size: float(np.median(samples[str(size)])) for size in growth.sizes}
    figures = ", ".join(f"{size:,}: {number(median)}" for size, median in medians.items())
    per_1000 = ", ".join(
        number(1e3 * (medians[size] - medians[first]) / (size - first)) for size in growth.sizes[1:]
    )
    return Line(
        name=f"growth: {growth.name}, {first:,} to {last:,}, {what}",
        unit=unit,
        samples={OURS: samples[str(last)], LIMIT: straight},
        goals=GOALS,
        note=f"{growth.note}. In all, in {unit}: {figures}. Beyond the first size, per 1,000 "
        f"{growth.unit}: {per_1000}.",
    )


def _run_job(bench: Bench, job: str, path: Path, size: int) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.bench.growth", job, path, size, bench.threads]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=bench.folder,
        env=environment(bench),
        check=True,
        stdout=subprocess.PIPE,  # what goes wrong is seen on stderr
        text=True,
        timeout=bench.stop,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


# --- in a process of its own ----------------------------------------------------------------------


def _extract(path: Path, size: int, threads: int) -> None:
    settings = ExtractSettings(
        backbone=BackboneSettings(backbone="resnet18", weights="none", crop=112),
        device="cpu",
        threads=threads,
    )
    out = path / "features.h5"
    lf.extract(lf.Cohort.load(path), out, settings)
    out.unlink()


def _fit(path: Path, size: int, threads: int) -> None:
    _fit_heads(path, HeadGrid(agg=("bnsigmoid",)), threads)


def _fit_many(path: Path, size: int, threads: int) -> None:
    rates = tuple(np.geomspace(1e-4, 1e-1, size).tolist())
    _fit_heads(path, HeadGrid(agg=("bnsigmoid",), lr=rates), threads)


def _fit_heads(path: Path, heads: HeadGrid | list[HeadSettings], threads: int) -> None:
    settings = FitSettings(seeds=1, epochs=5, precision="float32", device="cpu", threads=threads)
    lf.fit_heads(path, heads, settings)


JOBS = {"extract": _extract, "fit": _fit, "heads": _fit_many}


def main() -> None:
    job, path, size, threads = sys.argv[1:]
    seconds = seconds_of(lambda: JOBS[job](Path(path), int(size), int(threads)))
    print(json.dumps({"seconds": seconds, "megabytes": peak_megabytes()}))


if __name__ == "__main__":
    main()
