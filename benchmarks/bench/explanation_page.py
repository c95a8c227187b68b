"""The explanation page of a cohort of the challenge's size: seconds to make it, and its size."""

from pathlib import Path

import lymphfeat as lf
from benchmarks.bench.inputs import challenge_sizes, dealt_out, photographs
from benchmarks.bench.measure import LYMPHFEAT, OURS, Bench, in_turn, run
from benchmarks.bench.results import Goal, Line
from lymphfeat.settings import BackboneSettings, EndToEndSettings


def measure(bench: Bench) -> list[Line]:
    sizes = challenge_sizes(bench)
    cohort, model = dealt_out(bench, sizes), _train(bench)
    megabytes: list[float] = []

    def ours() -> float:
        page = bench.new("page.html")
        words = ("explain", "--model", model, "--cohort", cohort, "--out", page)
        options = ("--figures", "none", "--device", "cpu", "--threads", bench.threads)
        ran = run(bench, [*LYMPHFEAT, *words, *options])
        megabytes.append(page.stat().st_size / 1e6)
        return ran.seconds

    seconds = in_turn(bench, {OURS: ours}, warm_up=False)
    what = f"{len(sizes)} patients, {sizes.sum():,} images, the command without separate figures"
    return [
        Line(
            name="explanation page",
            unit="s",
            samples=seconds,
            goals=(Goal(text="≤ 60 s", at_most=60),),
            note=f"{what}; scoring the images counts. No repeat begins after "
            f"{bench.patience / 60:.0f} min.",
        ),
        Line(
            name="explanation page, size",
            unit="MB",
            samples={OURS: megabytes},
            goals=(Goal(text="≤ 15 MB", at_most=15),),
            note=f"{what}; rendered cells.",
        ),
    ]


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
