"""The explanation page of a cohort of the challenge's size: seconds to make it, and its size."""

from functools import partial
from pathlib import Path

import lymphfeat as lf
from benchmarks.bench.extraction import precisions
from benchmarks.bench.inputs import challenge_sizes, dealt_out, photographs
from benchmarks.bench.measure import LYMPHFEAT, OURS, Bench, in_turn, run
from benchmarks.bench.results import Goal, Line
from lymphfeat.settings import BackboneSettings, EndToEndSettings, Precision


def measure(bench: Bench) -> list[Line]:
    sizes = challenge_sizes(bench)
    cohort, model = dealt_out(bench, sizes), _train(bench)
    what = f"{len(sizes)} patients, {sizes.sum():,} images, the command without separate figures"
    megabytes: list[float] = []
    lines = []
    for precision in precisions():
        explained = partial(_explain, bench, model, cohort, precision, megabytes)
        lines.append(
            Line(
                name=f"explanation page, {precision}",
                unit="s",
                samples=in_turn(bench, {OURS: explained}, warm_up=False),
                goals=(Goal(text="≤ 60 s", at_most=60),),
                note=f"{what}; scoring the images counts. No repeat begins after "
                f"{bench.patience / 60:.0f} min.",
            )
        )
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
    bench: Bench, model: Path, cohort: Path, precision: Precision, megabytes: list[float]
) -> float:
    page = bench.new("page.html")
    words = ("explain", "--model", model, "--cohort", cohort, "--out", page)
    options = ("--figures", "none", "--precision", precision, "--device", "cpu")
    ran = run(bench, [*LYMPHFEAT, *words, *options, "--threads", bench.threads])
    megabytes.append(page.stat().st_size / 1e6)
    return ran.seconds


def _train(bench: Bench) -> Path:
    """Train a model for an epoch on next to nothing: what it says does not matter."""
    settings = EndToEndSettings(
        backbone=BackboneSettings(backbone="resnet18", weights="none"),
        epochs=1,
        images_per_patient=1,
        precision="float32",
        device="cpu",
        threads=bench.threads,
    )
    out = bench.new("model")
    lf.train(lf.Cohort.load(photographs(bench)), out, settings)
    return out
