"""The explanation page of a cohort of the challenge's size: seconds to make it, and its size."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lymphfeat as lf
from benchmarks.bench.extraction import precisions
from benchmarks.bench.inputs import challenge_sizes, dealt_out, photographs
from benchmarks.bench.measure import LYMPHFEAT, OURS, Bench, in_turn, run
from benchmarks.bench.results import Goal, Line
from lymphfeat.settings import (
    BackboneSettings,
    EndToEndSettings,
    ExtractSettings,
    FitSettings,
    HeadGrid,
)

_RANDOM = BackboneSettings(backbone="resnet18", weights="none")


def measure(bench: Bench) -> list[Line]:
    sizes = challenge_sizes(bench)
    cohort = dealt_out(bench, sizes)
    single, (store, final) = _train(bench), _finalize(bench, cohort)
    what = f"{len(sizes)} patients, {sizes.sum():,} images, the command without separate figures"
    runs = {
        precision: ("--model", single, "--precision", precision) for precision in precisions()
    } | {"from a store": ("--model", final, "--store", store)}
    notes = {"from a store": "a final model; the store's maps are read, and the images shown"}
    megabytes: list[float] = []
    lines = [
        Line(
            name=f"explanation page, {name}",
            unit="s",
            samples=in_turn(
                bench,
                {OURS: partial(_explain, bench, cohort, options, megabytes)},
                warm_up=False,
            ),
            goals=(Goal(text="≤ 60 s", at_most=60),),
            note=f"{what}; {notes.get(name, 'scoring the images counts')}. No repeat begins after "
            f"{bench.patience / 60:.0f} min.",
        )
        for name, options in runs.items()
    ]
    return [
        *lines,
        Line(
            name="explanation page, size",
            unit="MB",
            samples={OURS: megabytes},
            goals=(Goal(text="≤ 15 MB", at_most=15),),
            note=f"{what}; rendered cells.",
        ),
    ]


def _explain(
    bench: Bench, cohort: Path, options: Sequence[str | Path], megabytes: list[float]
) -> float:
    page = bench.new("page.html")
    words = ("explain", *options, "--cohort", cohort, "--out", page, "--figures", "none")
    ran = run(bench, [*LYMPHFEAT, *words, "--device", "cpu", "--threads", bench.threads])
    megabytes.append(page.stat().st_size / 1e6)
    return ran.seconds


def _train(bench: Bench) -> Path:
    """Train a model for an epoch on next to nothing: what it says does not matter."""
    settings = EndToEndSettings(
        backbone=_RANDOM,
        epochs=1,
        images_per_patient=1,
        precision="float32",
        device="cpu",
        threads=bench.threads,
    )
    out = bench.new("model")
    lf.train(lf.Cohort.load(photographs(bench)), out, settings)
    return out


def _finalize(bench: Bench, cohort: Path) -> tuple[Path, Path]:
    """Extract a store of a cohort, and make a final model of it; return both."""
    recipe = ExtractSettings(
        backbone=_RANDOM, precision="float32", device="cpu", threads=bench.threads
    )
    store = lf.extract(lf.Cohort.load(cohort), bench.new("store.h5"), recipe)
    fitted, model = bench.new("run"), bench.new("final")
    settings = FitSettings(
        seeds=1, epochs=1, fusions=(), allow_shared_images=True, threads=bench.threads
    )
    lf.fit_heads(store, HeadGrid(agg=("bnsigmoid",)), settings, fitted)
    lf.finalize(fitted, model, row="bnsigmoid")
    return store.path, model
